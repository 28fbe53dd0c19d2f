// Tiles of attention for AVX-512 with bf16 products: queries, keys, probabilities and values stay bf16.
#pragma once

#include <cstring>

#include "tile/avx512bf16.h"

namespace narrows::NARROWS_TARGET {

// What rows are broadcast as: two neighbouring numbers.
using Word = uint32_t;
constexpr int64_t WORDS_OF_PAIR = 1;
using Probability = bf16;
using Query = bf16;

inline void to_queries(Query* to, const bf16* from, int64_t count) { std::memcpy(to, from, count * sizeof(bf16)); }

// One row's `num_columns` numbers as words `height` apart.
inline void pack_row(Word* to, int64_t height, const bf16* row, int64_t num_columns) {
    for (int64_t p = 0; p < num_columns / 2; ++p) std::memcpy(to + p * height, row + 2 * p, 4);
    if (num_columns % 2) to[num_columns / 2 * height] = row[num_columns - 1];
}

// `height` rows side by side.
template <typename RowOf>
inline void pack_rows(Word* to, int64_t height, RowOf row_of, int64_t num_columns) {
    for (int64_t r = 0; r < height; ++r) pack_row(to + r, height, row_of(r), num_columns);
}

// A panel's 32 outputs as rows, words 32 apart.
inline const Word* as_rows(const uint32_t* panel, int64_t) { return panel; }

// Calls `work.operator()<VECTORS>(first)` until both halves of a panel have had their turn: here at once.
template <int ROWS, typename Work>
[[gnu::always_inline]] inline void for_vectors(Work work) {
    work.template operator()<2>(0);
}

// Adds the products of ROWS rows with one panel. Row r's word w is at rows[r * ROW_STEP + w * STEP].
template <int64_t ROW_STEP, int64_t STEP, int ROWS>
[[gnu::always_inline]] inline void add_words(F32x16 (&sums)[ROWS][2], const Word* rows, const uint32_t* panel, int,
                                             int64_t num_pairs) {
    for (int64_t p = 0; p < num_pairs; ++p) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + 16);
        fetch_near(panel + 256);
        fetch_near(panel + 272);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(rows[r * ROW_STEP]));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, w1);
        }
        rows += STEP;
        panel += PANEL;
    }
}

// Two rows of sixteen numbers as sixteen pairs of bf16.
inline void store_paired(uint32_t* to, F32x16 first, F32x16 second) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(first)), high = _mm512_cvtepu16_epi32(narrow(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// ROWS rows from `first_row` on of one panel (`rows`, see as_rows), times another panel: stored as pairs of rows.
template <int ROWS>
inline void rows_times(uint32_t* pairs, const Word* rows, int64_t first_row, const uint32_t* panel, int64_t num_pairs) {
    for_vectors<ROWS>([&]<int VECTORS>(int first) [[gnu::always_inline]] {
        F32x16 sums[ROWS][VECTORS];
        clear(sums);
        add_words<1, PANEL>(sums, rows + first_row, panel, first, num_pairs);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r += 2) {
            uint32_t* to = pairs + (first_row + r) / 2 * PANEL;
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) store_paired(to + 16 * (first + v), sums[r][v], sums[r + 1][v]);
        }
    });
}

// All 32 rows of one panel times another panel: 16 rows of pairs of rows.
inline void panel_times_panel(uint32_t* pairs, const Word* rows, const uint32_t* panel, int64_t num_pairs) {
    constexpr int64_t WHOLE = PANEL / BLOCK - 1;  // blocks; the rest in two of even heights
    for (int64_t b = 0; b < WHOLE; ++b) rows_times<BLOCK>(pairs, rows, b * BLOCK, panel, num_pairs);
    constexpr int64_t REST = PANEL - WHOLE * BLOCK, FIRST = (REST / 2 + 1) / 2 * 2;
    rows_times<FIRST>(pairs, rows, WHOLE * BLOCK, panel, num_pairs);
    rows_times<REST - FIRST>(pairs, rows, WHOLE * BLOCK + FIRST, panel, num_pairs);
}

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

constexpr int64_t TOKENS = 128;  // most of a block of decode attention
constexpr int MOST_HEADS = 8;    // whose sums add_values keeps: 8 x 2 accumulators

// Sixteen vectors to their sixteen sums.
inline F32x16 sums_of(const F32x16 (&x)[16]) {
    F32x16 y[8], z[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(y[2 * i]), b = _mm512_castps_pd(y[2 * i + 1]);
        z[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    const auto halves = [](F32x16 a, F32x16 b) {
        return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    };
    return halves(halves(z[0], z[1]), halves(z[2], z[3]));
}

// Scores of H heads (rows of `q`, zeros behind the last column) for 16 / H tokens.
template <int H>
inline void score(float* scores, const Query* q, int64_t q_stride, const bf16* const* token, int64_t num_columns) {
    constexpr int N = 16 / H;
    F32x16 sums[16];
#pragma GCC unroll 16
    for (auto& sum : sums) sum = zero();
    const auto add = [&](int64_t column, __mmask32 mask) [[gnu::always_inline]] {
        __m512bh x[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) x[h] = (__m512bh)_mm512_loadu_si512(q + h * q_stride + column);
#pragma GCC unroll 16
        for (int t = 0; t < N; ++t) {
            const __m512bh key = (__m512bh)(mask == 0xffffffff ? _mm512_loadu_si512(token[t] + column)
                                                               : _mm512_maskz_loadu_epi16(mask, token[t] + column));
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sums[h * N + t] = _mm512_dpbf16_ps(sums[h * N + t], x[h], key);
        }
    };
    int64_t column = 0;
    for (; column + 32 <= num_columns; column += 32) add(column, 0xffffffff);
    if (column < num_columns) add(column, (1u << (num_columns - column)) - 1);
    alignas(64) float all[16];
    _mm512_store_ps(all, sums_of(sums));
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) std::memcpy(scores + h * TOKENS, all + h * N, N * sizeof(float));
}

// Sums of H heads over 32 columns: `sums` shrunk, then the products of probabilities and values added. Columns are in
// the order that unpacking leaves, until `ordered`.
template <int H>
inline void add_values(float* sums, int64_t sums_stride, const float* shrink, const Probability* probabilities,
                       const bf16* const* token, int64_t num_tokens, int64_t column, int64_t there) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(probabilities);
    const __mmask32 mask = there >= 32 ? 0xffffffff : (1u << there) - 1;
    F32x16 low[H], high[H];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
        const F32x16 kept = set(shrink[h]);
        low[h] = load(sums + h * sums_stride) * kept;
        high[h] = load(sums + h * sums_stride + 16) * kept;
    }
    const auto add = [&](__m512i first, __m512i second) [[gnu::always_inline]] {
        const __m512bh v0 = (__m512bh)_mm512_unpacklo_epi16(first, second);
        const __m512bh v1 = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(p[h * TOKENS / 2]));
            low[h] = _mm512_dpbf16_ps(low[h], x, v0);
            high[h] = _mm512_dpbf16_ps(high[h], x, v1);
        }
        ++p;
    };
    if (mask == 0xffffffff) {
        for (int64_t t = 0; t < num_tokens; t += 2) {
            _mm_prefetch(reinterpret_cast<const char*>(token[t + 4] + column), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(token[t + 5] + column), _MM_HINT_T0);
            add(_mm512_loadu_si512(token[t] + column), _mm512_loadu_si512(token[t + 1] + column));
        }
    } else {
        for (int64_t t = 0; t < num_tokens; t += 2) {
            add(_mm512_maskz_loadu_epi16(mask, token[t] + column),
                _mm512_maskz_loadu_epi16(mask, token[t + 1] + column));
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
        store(sums + h * sums_stride, low[h]);
        store(sums + h * sums_stride + 16, high[h]);
    }
}

// What add_values left of 32 columns, times `share`, in order and rounded.
inline void ordered(bf16* out, const float* sums, F32x16 share, int64_t there) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const F32x16 low = load(sums) * share;
    const F32x16 high = load(sums + 16) * share;
    store(out, _mm512_permutex2var_ps(low, first, high), first_lanes(there));
    store(out + 16, _mm512_permutex2var_ps(low, second, high), first_lanes(there - 16));
}

}  // namespace narrows::NARROWS_TARGET
