// What the attention kernels share: a register tile over packed keys or values, and one step of the online softmax.
//
// Keys are held as panels of 32 tokens: [D / 2][32][2] bf16, two neighbouring columns side by side; values as panels of
// 32 columns: [tokens / 2][32][2], two neighbouring tokens side by side. Queries and probabilities are broadcast, two
// numbers at a time. All sums are in float32, in one order for each result, whatever other rows and heads there are.
#pragma once

#include <cmath>

#include "gemm.h"

#ifdef NARROWS_GEMM

namespace narrows {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float NO_SCORE = -1e30f;  // below every score; finite, so that differences of it are numbers

// Adds the products of ROWS rows with one panel. Row r's pair p is at rows[r * ROW_STEP + p * PAIR_STEP].
template <int ROWS, int64_t ROW_STEP, int64_t PAIR_STEP>
[[gnu::always_inline]] inline void add_products(__m512 (&low)[ROWS], __m512 (&high)[ROWS], const uint32_t* rows,
                                                const uint32_t* panel, int64_t num_pairs) {
    for (int64_t p = 0; p < num_pairs; ++p) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + 16);
        _mm_prefetch(reinterpret_cast<const char*>(panel) + 1024, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(panel) + 1088, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(rows[r * ROW_STEP]));
            low[r] = _mm512_dpbf16_ps(low[r], x, w0);
            high[r] = _mm512_dpbf16_ps(high[r], x, w1);
        }
        rows += PAIR_STEP;
        panel += PANEL;
    }
}

template <int ROWS>
[[gnu::always_inline]] inline void clear(__m512 (&low)[ROWS], __m512 (&high)[ROWS]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
}

// Two rows of sixteen numbers as sixteen pairs of bf16.
inline __m512i paired(__m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(first)), high = _mm512_cvtepu16_epi32(narrow(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 2^x to about 1 unit in the last place of float32, for x <= 0; 0 far below.
inline __m512 exp2_16(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);  // ln(2)^k / k!
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// One row's softmax so far: the largest score and the sum of 2^(score - largest), scores in units of log 2.
struct Softmax {
    float largest = NO_SCORE, sum = 0.0f;
};

// Takes `seen` more scores into a row's softmax. Their probabilities (2^(score - largest), rounded to bf16) go to `p`,
// zeros behind them up to `padded`, a multiple of 16; returns what all earlier sums are to be multiplied by.
inline float take_scores(Softmax& row, const float* scores, int64_t seen, int64_t padded, float scale_log2, bf16* p) {
    if (seen <= 0) {
        for (int64_t i = 0; i < padded; i += 16) _mm256_storeu_si256((__m256i*)(p + i), _mm256_setzero_si256());
        return 1.0f;
    }
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 top = lowest;
    int64_t i = 0;
    for (; i + 16 <= seen; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
    const __mmask16 rest = first_lanes(seen - i);
    if (rest) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, rest, scores + i));
    const float largest = std::max(row.largest, _mm512_reduce_max_ps(top) * scale_log2);
    const float shrink = _mm512_cvtss_f32(exp2_16(_mm512_set1_ps(row.largest - largest)));
    const __m512 scale = _mm512_set1_ps(scale_log2), down = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    for (i = 0; i + 16 <= seen; i += 16) {
        const __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, down));
        sum = _mm512_add_ps(sum, e);
        store16(p + i, e);
    }
    if (rest) {
        const __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(rest, scores + i), scale, down));
        const __m512 kept = _mm512_maskz_mov_ps(rest, e);
        sum = _mm512_add_ps(sum, kept);
        store16(p + i, kept);
        i += 16;
    }
    for (; i < padded; i += 16) _mm256_storeu_si256((__m256i*)(p + i), _mm256_setzero_si256());
    row.sum = row.sum * shrink + _mm512_reduce_add_ps(sum);
    row.largest = largest;
    return shrink;
}

}  // namespace narrows
#endif
