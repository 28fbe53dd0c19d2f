// Keys and values of a paged cache as the panels that attention multiplies with (attention.h). Knows addresses of
// tokens, not what the tokens are.
#pragma once

#include "attention.h"

#ifdef NARROWS_GEMM

namespace narrows {

// Sixteen rows of sixteen pairs, turned: afterwards row p holds pair p of all sixteen.
inline void transpose16(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {  // lane l of y[i + 4 g]: pair 4 l + i of rows 4 g .. 4 g + 3
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// One panel of keys [pairs][32][2] of the tokens at `token[0..31]`, `num_columns` each.
inline void pack_keys(uint32_t* panel, const bf16* const* token, int64_t num_columns) {
    const int64_t whole = num_columns / 32;
    for (int half = 0; half < 2; ++half) {
        const bf16* const* rows = token + 16 * half;
        uint32_t* to = panel + 16 * half;
        for (int64_t c = 0; c < whole; ++c) {
            __m512i x[16];
            for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(rows[r] + 32 * c);
            transpose16(x);
            for (int p = 0; p < 16; ++p) _mm512_storeu_si512(to + (16 * c + p) * PANEL, x[p]);
        }
        for (int64_t c = 32 * whole; c < num_columns; c += 2) {
            for (int r = 0; r < 16; ++r) {
                const uint32_t next = c + 1 < num_columns ? rows[r][c + 1] : 0;
                to[c / 2 * PANEL + r] = rows[r][c] | next << 16;
            }
        }
    }
}

// Columns [column, column + 32) of values, `there` of them existing, as one panel [num_tokens / 2][32][2]; `num_tokens`
// is even.
inline void pack_values(uint32_t* panel, const bf16* const* token, int64_t num_tokens, int64_t column, int64_t there) {
    const __mmask16 low = first_lanes(there), high = first_lanes(there - 16);
    const auto pairs = [](const bf16* first, const bf16* second, __mmask16 mask) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
        return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second)), 16));
    };
    for (int64_t t = 0; t < num_tokens; t += 2) {
        const bf16 *first = token[t] + column, *second = token[t + 1] + column;
        _mm512_storeu_si512(panel, pairs(first, second, low));
        _mm512_storeu_si512(panel + 16, pairs(first + 16, second + 16, high));
        panel += PANEL;
    }
}

// Addresses of the tokens of a block; those beyond the context are its last one (their scores are never looked at).
inline void addresses(const bf16** token, const bf16* cache, int64_t slot_stride, const int64_t* slots, int64_t first,
                      int64_t count, int64_t context_len) {
    for (int64_t t = 0; t < count; ++t) token[t] = cache + slots[std::min(first + t, context_len - 1)] * slot_stride;
}

}  // namespace narrows
#endif
