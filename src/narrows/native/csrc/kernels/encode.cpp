// Rows as int8 with a scale of their own, and back.
#include <algorithm>
#include <limits>

#include "kernels/each_row.h"
#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

// scales[t] = max |x[t]| / 127, codes[t] = x[t] / scales[t] to the nearest, ties to even; of scales that are no normal
// number zeros, of rows that are not finite the scale NaN.
template <typename T>
void encode(int8_t* codes, float* scales, const T* x, int64_t x_stride, int64_t num_rows, int64_t width,
            int num_threads) {
    const I32x16 least = set_int(-127), most = set_int(127);
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T* from = x + t * x_stride;
        int8_t* to = codes + t * width;
        // As whole numbers the bits of magnitudes order as the magnitudes do, with infinity and then NaN at the end.
        I32x16 largest = zero_int();
        for (int64_t h = 0; h < width; h += 16) {
            largest = max(largest, bits_of(abs(load(from + h, first_lanes(width - h)))));
        }
        const int32_t bits = reduce_max(largest);
        float scale = std::bit_cast<float>(bits) / 127.0f;
        if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
        if (bits >= 0x7f800000) scale = std::numeric_limits<float>::quiet_NaN();
        scales[t] = scale;
        if (!(scale > 0.0f)) {
            std::fill(to, to + width, int8_t(0));
            return;
        }
        const F32x16 by = set(scale);
        for (int64_t h = 0; h < width; h += 16) {
            const Lanes here = first_lanes(width - h);
            store_i8(to + h, max(min(rounded(load(from + h, here) / by), most), least), here);
        }
    });
}

// out[t] = codes[t] * scales[t], rounded to T.
template <typename T>
void decode(T* out, const int8_t* codes, const float* scales, int64_t num_rows, int64_t width, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int8_t* from = codes + t * width;
        T* to = out + t * width;
        const F32x16 scale = set(scales[t]);
        for (int64_t h = 0; h < width; h += 16) {
            const Lanes here = first_lanes(width - h);
            store(to + h, to_floats(load_i8(from + h, here)) * scale, here);
        }
    });
}

}  // namespace

// codes [num_rows, width] int8 without gaps and a scale per row, of x with rows x_stride apart.
void encode_rows(int8_t* codes, float* scales, const void* x, int64_t x_stride, int64_t num_rows, int64_t width,
                 int wide, int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        encode(codes, scales, static_cast<const T*>(x), x_stride, num_rows, width, num_threads);
    });
}

// out [num_rows, width] of those codes and scales; nothing has gaps.
void decode_rows(void* out, const int8_t* codes, const float* scales, int64_t num_rows, int64_t width, int wide,
                 int num_threads) {
    with_type(wide, [&]<typename T>(T*) { decode(static_cast<T*>(out), codes, scales, num_rows, width, num_threads); });
}

}  // namespace narrows::NARROWS_TARGET
