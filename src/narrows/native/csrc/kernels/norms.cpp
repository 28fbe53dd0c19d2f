// RMSNorm of rows, alone or after a sum, in one pass over memory. A row's result never depends on other rows.
#include <algorithm>
#include <cmath>

#include "kernels/each_row.h"
#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

// out = weight * round(x / sqrt(mean(x^2) + eps)), rounded again; rounded to T before the weight, as transformers does.
// x may be out.
template <typename T>
void norm_row(T* out, const T* x, const T* weight, int64_t width, float eps) {
    F32x16 sum = zero(), other = sum;
    int64_t h = 0;
    for (; h + 32 <= width; h += 32) {
        const F32x16 a = load(x + h), b = load(x + h + 16);
        sum = mul_add(a, a, sum);
        other = mul_add(b, b, other);
    }
    for (; h < width; h += 16) {
        const F32x16 a = load(x + h, first_lanes(width - h));
        sum = mul_add(a, a, sum);
    }
    const float mean = reduce_sum(sum + other) / float(width);
    const F32x16 scale = set(1.0f / std::sqrt(mean + eps));
    const auto scaled = [&](F32x16 y, F32x16 by) {
        y = y * scale;
        return stored_as<T>(y) * by;
    };
    for (h = 0; h + 16 <= width; h += 16) store(out + h, scaled(load(x + h), load(weight + h)));
    if (h < width) {
        const Lanes here = first_lanes(width - h);
        store(out + h, scaled(load(x + h, here), load(weight + h, here)), here);
    }
}

template <typename T>
void norm_heads(T* out, int64_t out_stride, int64_t out_head_stride, const T* x, int64_t x_stride, int64_t head_stride,
                const T* weight, int64_t num_rows, int64_t num_heads, int64_t width, float eps, int num_threads) {
    for_rows(num_rows, num_heads * width, num_threads, [&](int64_t t) {
        for (int64_t n = 0; n < num_heads; ++n) {
            norm_row(out + t * out_stride + n * out_head_stride, x + t * x_stride + n * head_stride, weight, width,
                     eps);
        }
    });
}

template <typename T>
void add_norm(T* out, T* sum_out, const T* x, const T* residual, const T* weight, int64_t num_rows, int64_t width,
              float eps, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T *a = x + t * width, *b = residual + t * width;
        T* to = sum_out + t * width;
        int64_t h = 0;
        for (; h + 16 <= width; h += 16) store(to + h, load(a + h) + load(b + h));
        if (h < width) {
            const Lanes here = first_lanes(width - h);
            store(to + h, load(a + h, here) + load(b + h, here), here);
        }
        norm_row(out + t * width, to, weight, width, eps);
    });
}

template <typename T>
void add_all(T* out, const T* a, const T* b, int64_t num_rows, int64_t width, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int64_t first = t * width;
        for (int64_t h = 0; h < width; h += 16) {
            const Lanes here = first_lanes(width - h);
            store(out + first + h, load(a + first + h, here) + load(b + first + h, here), here);
        }
    });
}

template <typename T>
void norm_latents(T* out, const T* x, int64_t x_stride, const T* q_weight, int64_t q_width, const T* kv_weight,
                  int64_t kv_width, int64_t width, int64_t num_rows, float eps, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T* from = x + t * x_stride;
        T* to = out + t * width;
        if (q_width) norm_row(to, from, q_weight, q_width, eps);
        norm_row(to + q_width, from + q_width, kv_weight, kv_width, eps);
        std::copy(from + q_width + kv_width, from + width, to + q_width + kv_width);
    });
}

}  // namespace

// RMSNorm of x [num_rows, num_heads, width].
void rms_norm(void* out, int64_t out_stride, int64_t out_head_stride, const void* x, int64_t x_stride,
              int64_t head_stride, const void* weight, int64_t num_rows, int64_t num_heads, int64_t width, float eps,
              int wide, int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        norm_heads(static_cast<T*>(out), out_stride, out_head_stride, static_cast<const T*>(x), x_stride, head_stride,
                   static_cast<const T*>(weight), num_rows, num_heads, width, eps, num_threads);
    });
}

// sum_out = x + residual, out = RMSNorm(sum_out); all [num_rows, width] without gaps. sum_out may be residual or x, out
// may be x if sum_out is not.
void add_rms_norm(void* out, void* sum_out, const void* x, const void* residual, const void* weight, int64_t num_rows,
                  int64_t width, float eps, int wide, int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        add_norm(static_cast<T*>(out), static_cast<T*>(sum_out), static_cast<const T*>(x),
                 static_cast<const T*>(residual), static_cast<const T*>(weight), num_rows, width, eps, num_threads);
    });
}

// out = a + b; all [num_rows, width] without gaps. out may be either.
void add_rows(void* out, const void* a, const void* b, int64_t num_rows, int64_t width, int wide, int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        add_all(static_cast<T*>(out), static_cast<const T*>(a), static_cast<const T*>(b), num_rows, width, num_threads);
    });
}

// RMSNorm of the first q_width columns (0: none) and of the kv_width after them, each alone; the rest copied. out has
// no gaps.
void latent_norm(void* out, const void* x, int64_t x_stride, const void* q_weight, int64_t q_width,
                 const void* kv_weight, int64_t kv_width, int64_t width, int64_t num_rows, float eps, int wide,
                 int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        norm_latents(static_cast<T*>(out), static_cast<const T*>(x), x_stride, static_cast<const T*>(q_weight), q_width,
                     static_cast<const T*>(kv_weight), kv_width, width, num_rows, eps, num_threads);
    });
}

}  // namespace narrows::NARROWS_TARGET
