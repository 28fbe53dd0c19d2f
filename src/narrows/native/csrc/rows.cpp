// What is done to each row alone, in one pass over memory: norms, the router, the embedding, the best
// column, rows as int8 and back.
//
// A row's result never depends on other rows. Rows are shared out to threads only where there is work for them.
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "export.h"
#include "fatal.h"
#include "rows.h"
#include "tape.h"

// 1 where these functions are compiled for this CPU, else 0 (and then nothing else here may be called).
NARROWS_EXPORT int narrows_rows() {
#ifdef NARROWS_VECTORS
    return 1;
#else
    return 0;
#endif
}

#ifdef NARROWS_VECTORS
namespace {

// `row(t)` for every row, on up to `num_threads` threads; `work` is roughly how many numbers a row has to go through.
template <typename Row>
void for_rows(int64_t num_rows, int64_t work, int num_threads, Row row) {
    constexpr int64_t WORTH_A_TEAM = 1 << 16;
    if (num_threads <= 1 || num_rows * work < WORTH_A_TEAM) {
        for (int64_t t = 0; t < num_rows; ++t) row(t);
        return;
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t t = 0; t < num_rows; ++t) row(t);
}

// out = weight * round(x / sqrt(mean(x^2) + eps)), rounded again; rounded to T before the weight, as transformers does.
// x may be out.
template <typename T>
void norm_row(T* out, const T* x, const T* weight, int64_t width, float eps) {
    __m512 sum = _mm512_setzero_ps(), other = sum;
    int64_t h = 0;
    for (; h + 32 <= width; h += 32) {
        const __m512 a = load16(x + h), b = load16(x + h + 16);
        sum = _mm512_fmadd_ps(a, a, sum);
        other = _mm512_fmadd_ps(b, b, other);
    }
    for (; h < width; h += 16) {
        const __m512 a = load16(x + h, first_lanes(width - h));
        sum = _mm512_fmadd_ps(a, a, sum);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum, other)) / float(width);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    const auto scaled = [&](__m512 y, __m512 by) {
        y = _mm512_mul_ps(y, scale);
        if (sizeof(T) == 2) y = widen(narrow(y));
        return _mm512_mul_ps(y, by);
    };
    for (h = 0; h + 16 <= width; h += 16) store16(out + h, scaled(load16(x + h), load16(weight + h)));
    if (h < width) {
        const __mmask16 here = first_lanes(width - h);
        store16(out + h, scaled(load16(x + h, here), load16(weight + h, here)), here);
    }
}

template <typename T>
void rms_norm(T* out, int64_t out_stride, int64_t out_head_stride, const T* x, int64_t x_stride, int64_t head_stride,
              const T* weight, int64_t num_rows, int64_t num_heads, int64_t width, float eps, int num_threads) {
    for_rows(num_rows, num_heads * width, num_threads, [&](int64_t t) {
        for (int64_t n = 0; n < num_heads; ++n) {
            norm_row(out + t * out_stride + n * out_head_stride, x + t * x_stride + n * head_stride, weight, width, eps);
        }
    });
}

template <typename T>
void add_rms_norm(T* out, T* sum_out, const T* x, const T* residual, const T* weight, int64_t num_rows,
                  int64_t width, float eps, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T *a = x + t * width, *b = residual + t * width;
        T* to = sum_out + t * width;
        int64_t h = 0;
        for (; h + 16 <= width; h += 16) store16(to + h, _mm512_add_ps(load16(a + h), load16(b + h)));
        if (h < width) {
            const __mmask16 here = first_lanes(width - h);
            store16(to + h, _mm512_add_ps(load16(a + h, here), load16(b + h, here)), here);
        }
        norm_row(out + t * width, to, weight, width, eps);
    });
}

template <typename T>
void add_rows(T* out, const T* a, const T* b, int64_t num_rows, int64_t width, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int64_t first = t * width;
        for (int64_t h = 0; h < width; h += 16) {
            const __mmask16 here = first_lanes(width - h);
            store16(out + first + h, _mm512_add_ps(load16(a + first + h, here), load16(b + first + h, here)), here);
        }
    });
}

template <typename T>
void latent_norm(T* out, const T* x, int64_t x_stride, const T* q_weight, int64_t q_width, const T* kv_weight,
                 int64_t kv_width, int64_t width, int64_t num_rows, float eps, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T* from = x + t * x_stride;
        T* to = out + t * width;
        if (q_width) norm_row(to, from, q_weight, q_width, eps);
        norm_row(to + q_width, from + q_width, kv_weight, kv_width, eps);
        std::copy(from + q_width + kv_width, from + width, to + q_width + kv_width);
    });
}

// R rows times all experts' rows, in float32: sixteen partial sums each, added up at the end.
template <int R, typename T>
void logits_of(float* out, int64_t out_stride, const T* x, int64_t x_stride, const float* gate, int64_t num_experts,
               int64_t width) {
    constexpr int AT_ONCE = 4;
    for (int64_t first = 0; first < num_experts; first += AT_ONCE) {
        const float* row[AT_ONCE];
        for (int e = 0; e < AT_ONCE; ++e) row[e] = gate + std::min(first + e, num_experts - 1) * width;
        __m512 sum[R][AT_ONCE];
        for (int r = 0; r < R; ++r) {
            for (int e = 0; e < AT_ONCE; ++e) sum[r][e] = _mm512_setzero_ps();
        }
        for (int64_t h = 0; h < width; h += 16) {
            const __mmask16 here = first_lanes(width - h);
            __m512 w[AT_ONCE];
#pragma GCC unroll 4
            for (int e = 0; e < AT_ONCE; ++e) w[e] = load16(row[e] + h, here);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 value = load16(x + r * x_stride + h, here);
#pragma GCC unroll 4
                for (int e = 0; e < AT_ONCE; ++e) sum[r][e] = _mm512_fmadd_ps(value, w[e], sum[r][e]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int e = 0; e < AT_ONCE && first + e < num_experts; ++e) {
                out[r * out_stride + first + e] = _mm512_reduce_add_ps(sum[r][e]);
            }
        }
    }
}

// A routing rule, as ops/route.py states it.
struct Rule {
    int64_t top_k, num_groups, topk_group;  // num_groups 1: none
    int softmax, two_best;                  // two_best: a group is worth the sum of its two best, else its best
    int normalise;
    float factor;
};

// The `count` best of values[0 .. size) where `allowed` says so (null: all), falling, equal ones by rising id.
void best(const float* values, int64_t size, const uint8_t* allowed, int64_t per_flag, int64_t count, int64_t* ids) {
    int64_t held = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (allowed != nullptr && !allowed[i / per_flag]) continue;
        int64_t at = held;
        while (at > 0 && !(values[i] <= values[ids[at - 1]])) --at;
        if (at == count) continue;
        held = std::min(held + 1, count);
        for (int64_t j = held - 1; j > at; --j) ids[j] = ids[j - 1];
        ids[at] = i;
    }
}

void route_row(int32_t* ids, float* weights, const float* logits, const float* bias, int64_t num_experts,
               const Rule& rule, float* score, float* choice, float* worth, uint8_t* allowed, int64_t* chosen) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    if (rule.softmax) {
        const float most = *std::max_element(logits, logits + num_experts);
        __m512 sum = zero;
        for (int64_t e = 0; e < num_experts; e += 16) {
            const __mmask16 here = first_lanes(num_experts - e);
            const __m512 y = _mm512_maskz_mov_ps(here, exp16(_mm512_sub_ps(load16(logits + e, here), _mm512_set1_ps(most))));
            store16(score + e, y, here);
            sum = _mm512_add_ps(sum, y);
        }
        const float total = _mm512_reduce_add_ps(sum);
        for (int64_t e = 0; e < num_experts; ++e) score[e] /= total;
    } else {
        for (int64_t e = 0; e < num_experts; e += 16) {
            const __mmask16 here = first_lanes(num_experts - e);
            const __m512 y = exp16(_mm512_sub_ps(zero, load16(logits + e, here)));
            store16(score + e, _mm512_div_ps(one, _mm512_add_ps(one, y)), here);
        }
    }
    for (int64_t e = 0; e < num_experts; ++e) choice[e] = bias == nullptr ? score[e] : score[e] + bias[e];
    const int64_t size = num_experts / rule.num_groups;
    if (rule.num_groups > 1) {
        for (int64_t g = 0; g < rule.num_groups; ++g) {
            const int64_t count = rule.two_best && size > 1 ? 2 : 1;
            best(choice + g * size, size, nullptr, 1, count, chosen);
            worth[g] = choice[g * size + chosen[0]] + (count == 2 ? choice[g * size + chosen[1]] : 0.0f);
        }
        best(worth, rule.num_groups, nullptr, 1, rule.topk_group, chosen);
        std::fill(allowed, allowed + rule.num_groups, 0);
        for (int64_t i = 0; i < rule.topk_group; ++i) allowed[chosen[i]] = 1;
    }
    best(choice, num_experts, rule.num_groups > 1 ? allowed : nullptr, size, rule.top_k, chosen);
    float sum = 0.0f;
    for (int64_t k = 0; k < rule.top_k; ++k) {
        ids[k] = int32_t(chosen[k]);
        weights[k] = score[chosen[k]];
        sum += weights[k];
    }
    for (int64_t k = 0; k < rule.top_k; ++k) {
        weights[k] = (rule.normalise ? weights[k] / (sum + 1e-20f) : weights[k]) * rule.factor;
    }
}

template <typename T>
void router(int32_t* ids, float* weights, const T* x, int64_t x_stride, const float* gate, const float* bias,
            int64_t num_rows, int64_t num_experts, int64_t width, const Rule& rule, int num_threads) {
    constexpr int64_t R = 4;
    for_rows((num_rows + R - 1) / R, R * num_experts * width / 8, num_threads, [&](int64_t block) {
        static thread_local std::vector<float> numbers;
        static thread_local std::vector<int64_t> chosen;
        static thread_local std::vector<uint8_t> allowed;
        numbers.resize((R + 3) * num_experts);
        chosen.resize(num_experts + 2);
        allowed.resize(num_experts);
        float *logits = numbers.data(), *score = logits + R * num_experts;
        const int64_t first = block * R, count = std::min(R, num_rows - first);
        if (count == R) {
            logits_of<R>(logits, num_experts, x + first * x_stride, x_stride, gate, num_experts, width);
        } else {
            for (int64_t r = 0; r < count; ++r) {
                logits_of<1>(logits + r * num_experts, num_experts, x + (first + r) * x_stride, x_stride, gate,
                             num_experts, width);
            }
        }
        for (int64_t r = 0; r < count; ++r) {
            route_row(ids + (first + r) * rule.top_k, weights + (first + r) * rule.top_k, logits + r * num_experts, bias,
                      num_experts, rule, score, score + num_experts, score + 2 * num_experts, allowed.data(),
                      chosen.data());
        }
    });
}

// The first largest of a row; a NaN is larger than all.
template <typename T>
int64_t argmax_row(const T* x, int64_t width) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = none;
    for (int64_t v = 0; v < width; v += 16) {
        const __mmask16 here = first_lanes(width - v);
        const __m512 y = _mm512_mask_mov_ps(none, here, load16(x + v, here));
        const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        if (nan) return v + __builtin_ctz(nan);
        most = _mm512_max_ps(most, y);
    }
    const __m512 value = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t v = 0; v < width; v += 16) {
        const __mmask16 here = first_lanes(width - v);
        const __mmask16 equal = _mm512_mask_cmp_ps_mask(here, load16(x + v, here), value, _CMP_EQ_OQ);
        if (equal) return v + __builtin_ctz(equal);
    }
    return 0;
}

template <typename T>
void argmax(double* out, const T* x, int64_t stride, int64_t num_rows, int64_t width, int64_t first_id,
            int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int64_t at = argmax_row(x + t * stride, width);
        out[2 * t] = to_float(x[t * stride + at]);
        out[2 * t + 1] = double(first_id + at);
    });
}

// scales[t] = max |x[t]| / 127, codes[t] = x[t] / scales[t] to the nearest, ties to even; of scales that are no normal
// number zeros, of rows that are not finite the scale NaN.
template <typename T>
void encode_rows(int8_t* codes, float* scales, const T* x, int64_t x_stride, int64_t num_rows, int64_t width,
                 int num_threads) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i least = _mm512_set1_epi32(-127), most = _mm512_set1_epi32(127);
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const T* from = x + t * x_stride;
        int8_t* to = codes + t * width;
        // As whole numbers the bits of magnitudes order as the magnitudes do, with infinity and then NaN at the end.
        __m512i largest = _mm512_setzero_si512();
        for (int64_t h = 0; h < width; h += 16) {
            const __m512 y = load16(from + h, first_lanes(width - h));
            largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(y), magnitude));
        }
        const int32_t bits = _mm512_reduce_max_epi32(largest);
        float scale;
        std::memcpy(&scale, &bits, 4);
        scale /= 127.0f;
        if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
        if (bits >= 0x7f800000) scale = std::numeric_limits<float>::quiet_NaN();
        scales[t] = scale;
        if (!(scale > 0.0f)) {
            std::fill(to, to + width, int8_t(0));
            return;
        }
        const __m512 by = _mm512_set1_ps(scale);
        for (int64_t h = 0; h < width; h += 16) {
            const __mmask16 here = first_lanes(width - h);
            __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(load16(from + h, here), by));
            code = _mm512_max_epi32(_mm512_min_epi32(code, most), least);
            if (here == 0xffff) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + h), _mm512_cvtepi32_epi8(code));
            } else {
                _mm512_mask_cvtepi32_storeu_epi8(to + h, here, code);
            }
        }
    });
}

// out[t] = codes[t] * scales[t], rounded to T.
template <typename T>
void decode_rows(T* out, const int8_t* codes, const float* scales, int64_t num_rows, int64_t width, int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int8_t* from = codes + t * width;
        T* to = out + t * width;
        const __m512 scale = _mm512_set1_ps(scales[t]);
        for (int64_t h = 0; h < width; h += 16) {
            const __mmask16 here = first_lanes(width - h);
            const __m128i code = here == 0xffff ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + h))
                                                : _mm_maskz_loadu_epi8(here, from + h);
            store16(to + h, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code)), scale), here);
        }
    });
}

}  // namespace

// In all of these `wide` is 1 for float32 and 0 for bf16, and strides are in elements.

// RMSNorm of x [num_rows, num_heads, width].
NARROWS_EXPORT void narrows_rms_norm(void* out, int64_t out_stride, int64_t out_head_stride, const void* x,
                                     int64_t x_stride, int64_t head_stride, const void* weight, int64_t num_rows,
                                     int64_t num_heads, int64_t width, float eps, int wide, int num_threads) {
    NARROWS_TAPED(narrows_rms_norm(out, out_stride, out_head_stride, x, x_stride, head_stride, weight, num_rows,
                                   num_heads, width, eps, wide, num_threads));
    if (wide) {
        rms_norm((float*)out, out_stride, out_head_stride, (const float*)x, x_stride, head_stride, (const float*)weight,
                 num_rows, num_heads, width, eps, num_threads);
    } else {
        rms_norm((bf16*)out, out_stride, out_head_stride, (const bf16*)x, x_stride, head_stride, (const bf16*)weight,
                 num_rows, num_heads, width, eps, num_threads);
    }
}

// sum_out = x + residual, out = RMSNorm(sum_out); all [num_rows, width] without gaps. sum_out may be residual or x, out
// may be x if sum_out is not.
NARROWS_EXPORT void narrows_add_rms_norm(void* out, void* sum_out, const void* x, const void* residual,
                                         const void* weight, int64_t num_rows, int64_t width, float eps, int wide,
                                         int num_threads) {
    NARROWS_TAPED(narrows_add_rms_norm(out, sum_out, x, residual, weight, num_rows, width, eps, wide,
                                       num_threads));
    if (wide) {
        add_rms_norm((float*)out, (float*)sum_out, (const float*)x, (const float*)residual, (const float*)weight,
                     num_rows, width, eps, num_threads);
    } else {
        add_rms_norm((bf16*)out, (bf16*)sum_out, (const bf16*)x, (const bf16*)residual, (const bf16*)weight, num_rows,
                     width, eps, num_threads);
    }
}

// out = a + b; all [num_rows, width] without gaps. out may be either.
NARROWS_EXPORT void narrows_add_rows(void* out, const void* a, const void* b, int64_t num_rows, int64_t width, int wide,
                                     int num_threads) {
    NARROWS_TAPED(narrows_add_rows(out, a, b, num_rows, width, wide, num_threads));
    if (wide) {
        add_rows((float*)out, (const float*)a, (const float*)b, num_rows, width, num_threads);
    } else {
        add_rows((bf16*)out, (const bf16*)a, (const bf16*)b, num_rows, width, num_threads);
    }
}

// RMSNorm of the first q_width columns (0: none) and of the kv_width after them, each alone; the rest copied. out has
// no gaps.
NARROWS_EXPORT void narrows_latent_norm(void* out, const void* x, int64_t x_stride, const void* q_weight,
                                        int64_t q_width, const void* kv_weight, int64_t kv_width, int64_t width,
                                        int64_t num_rows, float eps, int wide, int num_threads) {
    NARROWS_TAPED(narrows_latent_norm(out, x, x_stride, q_weight, q_width, kv_weight, kv_width, width, num_rows,
                                      eps, wide, num_threads));
    if (wide) {
        latent_norm((float*)out, (const float*)x, x_stride, (const float*)q_weight, q_width, (const float*)kv_weight,
                    kv_width, width, num_rows, eps, num_threads);
    } else {
        latent_norm((bf16*)out, (const bf16*)x, x_stride, (const bf16*)q_weight, q_width, (const bf16*)kv_weight,
                    kv_width, width, num_rows, eps, num_threads);
    }
}

// Logits x gate^T in float32, then the rule: ids and weights [num_rows, top_k]. gate [num_experts, width] and bias
// (null: none) float32.
NARROWS_EXPORT void narrows_router(int32_t* ids, float* weights, const void* x, int64_t x_stride, const float* gate,
                                   const float* bias, int64_t num_rows, int64_t num_experts, int64_t width,
                                   int64_t top_k, int64_t num_groups, int64_t topk_group, int softmax, int two_best,
                                   int normalise, float factor, int wide, int num_threads) {
    NARROWS_TAPED(narrows_router(ids, weights, x, x_stride, gate, bias, num_rows, num_experts, width, top_k,
                                 num_groups, topk_group, softmax, two_best, normalise, factor, wide,
                                 num_threads));
    const Rule rule{top_k, num_groups, topk_group, softmax, two_best, normalise, factor};
    if (wide) {
        router(ids, weights, (const float*)x, x_stride, gate, bias, num_rows, num_experts, width, rule, num_threads);
    } else {
        router(ids, weights, (const bf16*)x, x_stride, gate, bias, num_rows, num_experts, width, rule, num_threads);
    }
}

// out[t] = table[id - first_id], or zeros for an id outside first_id <= id < first_id + num_ids; rows of `row_bytes`.
NARROWS_EXPORT void narrows_embedding(char* out, int64_t out_stride_bytes, const int64_t* ids, int64_t num_rows,
                                      const char* table, int64_t first_id, int64_t num_ids, int64_t row_bytes) {
    NARROWS_TAPED(narrows_embedding(out, out_stride_bytes, ids, num_rows, table, first_id, num_ids, row_bytes));
    for (int64_t t = 0; t < num_rows; ++t) {
        const int64_t at = ids[t] - first_id;
        if (at >= 0 && at < num_ids) {
            std::memcpy(out + t * out_stride_bytes, table + at * row_bytes, row_bytes);
        } else {
            std::memset(out + t * out_stride_bytes, 0, row_bytes);
        }
    }
}

// out[t] = (largest of x[t], first_id + its column), the lowest column of several; width at least 1.
NARROWS_EXPORT void narrows_argmax(double* out, const void* x, int64_t stride, int64_t num_rows, int64_t width,
                                   int64_t first_id, int wide, int num_threads) {
    NARROWS_TAPED(narrows_argmax(out, x, stride, num_rows, width, first_id, wide, num_threads));
    if (wide) {
        argmax(out, (const float*)x, stride, num_rows, width, first_id, num_threads);
    } else {
        argmax(out, (const bf16*)x, stride, num_rows, width, first_id, num_threads);
    }
}

// out[t] = the id of the largest of `num_pairs` (value, id), a NaN larger than all, ties to the lower id.
NARROWS_EXPORT void narrows_pick(int64_t* out, const double* pairs, int64_t stride, int64_t num_rows,
                                 int64_t num_pairs) {
    NARROWS_TAPED(narrows_pick(out, pairs, stride, num_rows, num_pairs));
    for (int64_t t = 0; t < num_rows; ++t) {
        const double* row = pairs + t * stride;
        double value = row[0], id = row[1];
        for (int64_t i = 1; i < num_pairs; ++i) {
            const double other = row[2 * i], its = row[2 * i + 1];
            const bool nan = std::isnan(value), larger = !nan && (std::isnan(other) || other > value);
            const bool equal = nan ? std::isnan(other) : other == value;
            if (larger || (equal && its < id)) value = other, id = its;
        }
        out[t] = int64_t(id);
    }
}

// codes [num_rows, width] int8 without gaps and a scale per row, of x with rows x_stride apart.
NARROWS_EXPORT void narrows_encode_rows(int8_t* codes, float* scales, const void* x, int64_t x_stride, int64_t num_rows,
                                        int64_t width, int wide, int num_threads) {
    NARROWS_TAPED(narrows_encode_rows(codes, scales, x, x_stride, num_rows, width, wide, num_threads));
    if (wide) {
        encode_rows(codes, scales, (const float*)x, x_stride, num_rows, width, num_threads);
    } else {
        encode_rows(codes, scales, (const bf16*)x, x_stride, num_rows, width, num_threads);
    }
}

// out [num_rows, width] of those codes and scales; nothing has gaps.
NARROWS_EXPORT void narrows_decode_rows(void* out, const int8_t* codes, const float* scales, int64_t num_rows,
                                        int64_t width, int wide, int num_threads) {
    NARROWS_TAPED(narrows_decode_rows(out, codes, scales, num_rows, width, wide, num_threads));
    if (wide) {
        decode_rows((float*)out, codes, scales, num_rows, width, num_threads);
    } else {
        decode_rows((bf16*)out, codes, scales, num_rows, width, num_threads);
    }
}
#endif

namespace {

template <typename T>
void add_norm_of(T* out, T* x, const T* residual, const T* weight, int64_t num_rows, int64_t width, float eps) {
#ifdef NARROWS_VECTORS
    if (residual)
        add_rms_norm(out, x, x, residual, weight, num_rows, width, eps, 1);
    else
        rms_norm(out, width, 0, x, width, 0, weight, num_rows, 1, width, eps, 1);
#else
    narrows::fatal("norms are not compiled for this CPU: narrows_rows() is 0, so nobody may ask for one");
#endif
}

}  // namespace

void rows::add_norm(void* out, void* x, const void* residual, const void* weight, int64_t num_rows, int64_t width,
                    float eps, bool wide) {
    if (wide)
        add_norm_of((float*)out, (float*)x, (const float*)residual, (const float*)weight, num_rows, width, eps);
    else
        add_norm_of((bf16*)out, (bf16*)x, (const bf16*)residual, (const bf16*)weight, num_rows, width, eps);
}
