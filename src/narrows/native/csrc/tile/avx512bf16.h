// Tiles for AVX-512 with bf16 products (vdpbf16ps) and VNNI (vpdpbusd).
//
// vdpbf16ps adds two products at once, rounds as it does (to odd, then once), and takes denormals as zeros: the bits of
// products are this target's own.
#pragma once

#include "kernels/scratch.h"
#include "simd/simd.h"
#include "tile/panels.h"
#include "tile/round_row.h"

namespace narrows::NARROWS_TARGET {

constexpr bool TAKES_BRGEMM = true;
constexpr int64_t BLOCK = 12;  // most rows of a block: 12 x 2 accumulators of the 32 registers

// Packs `num_rows` rows (`row_of` gives each one's address) into one block; `in_order`: as they are, for `Brgemm`.
template <typename RowOf>
inline void pack_rows(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool in_order) {
    const int64_t whole = num_inputs / 2;
    if (in_order) {
        for (int64_t r = 0; r < num_rows; ++r) {
            uint32_t* to = block + r * pairs_of(num_inputs);
            if (whole) std::memcpy(to, row_of(r), whole * 4);
            if (num_inputs % 2) to[whole] = row_of(r)[num_inputs - 1];
        }
        return;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        const bf16* row = row_of(r);
        uint32_t* to = block + r;
        for (int64_t p = 0; p < whole; ++p) {
            uint32_t pair;
            std::memcpy(&pair, row + 2 * p, 4);
            to[p * num_rows] = pair;
        }
        if (num_inputs % 2) to[whole * num_rows] = row[num_inputs - 1];
    }
}

// What a tile fetches with each word of a panel: `STREAMED` (the panel comes from memory) what lies 8 KB further on;
// else, the panel being in the L2 cache, its next lines from there, and `ahead`, `step` bytes each time, into the L2
// cache.
template <bool STREAMED>
inline void fetch(const uint32_t* panel, const char*& ahead, int64_t step) {
    const char* later = reinterpret_cast<const char*>(panel) + (STREAMED ? 8192 : 1024);
    _mm_prefetch(later, _MM_HINT_T0);
    _mm_prefetch(later + 64, _MM_HINT_T0);
    if (!STREAMED) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += step;
    }
}

// The register tile: `ROWS` packed rows times one panel; `store(row, low, high)` takes 2 x 16 results in float32.
template <int ROWS, bool STREAMED, typename Store>
inline void tile(const uint32_t* block, const uint32_t* panel, int64_t num_pairs, const char* ahead, int64_t ahead_step,
                 Store store) {
    __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < num_pairs; ++p) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + 16);
        fetch<STREAMED>(panel, ahead, ahead_step);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(block[r]));
            low[r] = _mm512_dpbf16_ps(low[r], x, w0);
            high[r] = _mm512_dpbf16_ps(high[r], x, w1);
        }
        block += ROWS;
        panel += PANEL;
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) store(r, low[r], high[r]);
}

template <typename Kind, bool STREAMED, typename Store>
inline void tile_of(int64_t rows, const uint32_t* block, const Packed& weight, int64_t panel, int64_t num_words,
                    const char* ahead, int64_t ahead_step, Store store) {
    switch (rows) {
#define CASE(N)                                                                                          \
    case N:                                                                                              \
        Kind::template multiply<N, STREAMED>(block, weight, panel, num_words, ahead, ahead_step, store); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

// Blocks [first, stop) of packed rows (`rows` begins with block `first`) times one panel. Of several passes over the
// panel each fetches its share of the one that comes next. `brgemm`: the rows are packed in order, and it multiplies.
template <typename Kind, typename Store>
inline void product_by_blocks(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop,
                              const Packed& weight, int64_t panel, int64_t num_inputs, const Brgemm* brgemm,
                              Store store) {
    const int64_t passes = stop - first, base = blocks.start(first), step = PANEL * 4 / passes;
    const int64_t num_words = Kind::panel_words(num_inputs), row_words = Kind::row_words(num_inputs);
    const uint32_t* begin = weight.panels + panel * num_words * PANEL;
    if (brgemm != nullptr && num_words > 0) {
        static thread_local Scratch for_sums;
        const int64_t count = blocks.start(stop) - base;
        float* sums = for_sums.of<float>(count * PANEL);
        brgemm->product(count, PANEL, 2 * num_words, 2 * num_words, PANEL, PANEL, false,
                        reinterpret_cast<const bf16*>(rows), reinterpret_cast<const bf16*>(begin), sums, true);
        for (int64_t r = 0; r < count; ++r) store(base + r, load(sums + r * PANEL), load(sums + r * PANEL + 16));
        return;
    }
    const char* next = reinterpret_cast<const char*>(begin + num_words * PANEL);
    for (int64_t b = first; b < stop; ++b) {
        const int64_t start = blocks.start(b), count = blocks.start(b + 1) - start;
        const uint32_t* block = rows + (start - base) * row_words;
        const auto keep = [&](int64_t r, F32x16 low, F32x16 high) { store(start + r, low, high); };
        if (passes == 1) {
            tile_of<Kind, true>(count, block, weight, panel, num_words, nullptr, 0, keep);
        } else {
            tile_of<Kind, false>(count, block, weight, panel, num_words, next + (b - first) * step * num_words, step,
                                 keep);
        }
    }
}

struct Bf16 {
    static constexpr int64_t MOST_ROWS = BLOCK;  // of a block
    static int64_t row_words(int64_t num_inputs) { return pairs_of(num_inputs); }
    static int64_t panel_words(int64_t num_inputs) { return pairs_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }
    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool in_order) {
        pack_rows(block, row_of, num_rows, num_inputs, in_order);
    }
    template <int ROWS, bool STREAMED, typename Store>
    static void multiply(const uint32_t* block, const Packed& weight, int64_t panel, int64_t num_words,
                         const char* ahead, int64_t ahead_step, Store store) {
        tile<ROWS, STREAMED>(block, weight.panels + panel * num_words * PANEL, num_words, ahead, ahead_step, store);
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm* brgemm, Store store) {
        product_by_blocks<Bf16>(rows, blocks, first, stop, weight, panel, num_inputs, brgemm, store);
    }
};

struct Int8 {
    static constexpr int64_t MOST_ROWS = 8;  // with 12 the compiler runs out of registers: 1.9 times the time of 8
    static int64_t row_words(int64_t num_inputs) { return quads_of(num_inputs) + 2; }  // the last two: Rounded
    static int64_t panel_words(int64_t num_inputs) { return quads_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        static thread_local Scratch for_row;
        const int64_t num_quads = quads_of(num_inputs);
        int8_t* rounded = for_row.of<int8_t>(num_inputs + 16);
        for (int64_t r = 0; r < num_rows; ++r) {
            const Rounded of_row = round_row(rounded, row_of(r), num_inputs);
            for (int64_t q = 0; q < num_quads; ++q) std::memcpy(block + q * num_rows + r, rounded + 4 * q, 4);
            std::memcpy(block + num_quads * num_rows + r, &of_row.scale, 4);
            std::memcpy(block + (num_quads + 1) * num_rows + r, &of_row.offset, 4);
        }
    }

    template <int ROWS, bool STREAMED, typename Store>
    static void multiply(const uint32_t* block, const Packed& weight, int64_t panel, int64_t num_quads,
                         const char* ahead, int64_t ahead_step, Store store) {
        const uint32_t* words = weight.panels + panel * num_quads * PANEL;
        __m512i low[ROWS], high[ROWS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_si512();
        for (int64_t q = 0; q < num_quads; ++q) {
            const __m512i w0 = _mm512_loadu_si512(words), w1 = _mm512_loadu_si512(words + 16);
            fetch<STREAMED>(words, ahead, ahead_step);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const __m512i x = _mm512_set1_epi32(int32_t(block[r]));
                low[r] = _mm512_dpbusd_epi32(low[r], w0, x);
                high[r] = _mm512_dpbusd_epi32(high[r], w1, x);
            }
            block += ROWS;
            words += PANEL;
        }
        const __m512 s0 = load(weight.scales + panel * PANEL), s1 = load(weight.scales + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            float scale;
            std::memcpy(&scale, block + r, 4);
            const __m512 of_row = _mm512_set1_ps(scale);
            const __m512i offset = _mm512_set1_epi32(int32_t(block[ROWS + r]));
            const __m512 sum0 = _mm512_cvtepi32_ps(_mm512_sub_epi32(low[r], offset));
            const __m512 sum1 = _mm512_cvtepi32_ps(_mm512_sub_epi32(high[r], offset));
            store(r, _mm512_mul_ps(sum0, _mm512_mul_ps(s0, of_row)), _mm512_mul_ps(sum1, _mm512_mul_ps(s1, of_row)));
        }
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm* brgemm, Store store) {
        product_by_blocks<Int8>(rows, blocks, first, stop, weight, panel, num_inputs, brgemm, store);
    }
};

// Four numbers of each lane as two pairs of bf16: exact, since bf16 holds 8 bits.
struct TwoPairs {
    __m512bh first, second;
    explicit TwoPairs(__m512i held) {
        const __m512i quad = _mm512_xor_si512(held, _mm512_set1_epi32(int32_t(0x80808080)));  // 128 less
        const auto number = [&](int byte) {
            return _mm512_castps_si512(
                _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * byte), 24)));
        };
        const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
        first = (__m512bh)_mm512_or_si512(_mm512_srli_epi32(number(0), 16), _mm512_and_si512(number(1), upper));
        second = (__m512bh)_mm512_or_si512(_mm512_srli_epi32(number(2), 16), _mm512_and_si512(number(3), upper));
    }
};

struct WeightInt8 {
    static constexpr int64_t MOST_ROWS = BLOCK;
    static int64_t row_words(int64_t num_inputs) { return 2 * quads_of(num_inputs); }
    static int64_t panel_words(int64_t num_inputs) { return quads_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        pack_rows(block, row_of, num_rows, num_inputs, false);
        if (pairs_of(num_inputs) % 2) std::memset(block + pairs_of(num_inputs) * num_rows, 0, num_rows * 4);
    }

    // Not inlined: with every height of tile in one function GCC 12 keeps the sums on the stack, 2 to 4 times slower.
    template <int ROWS, bool STREAMED, typename Store>
    [[gnu::noinline]] static void multiply(const uint32_t* block, const Packed& weight, int64_t panel,
                                           int64_t num_quads, const char* ahead, int64_t ahead_step, Store store) {
        const uint32_t* words = weight.panels + panel * num_quads * PANEL;
        __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
        for (int64_t q = 0; q < num_quads; ++q) {
            const TwoPairs w0(_mm512_loadu_si512(words)), w1(_mm512_loadu_si512(words + 16));
            fetch<STREAMED>(words, ahead, ahead_step);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(block[r]));
                low[r] = _mm512_dpbf16_ps(low[r], x, w0.first);
                high[r] = _mm512_dpbf16_ps(high[r], x, w1.first);
            }
            block += ROWS;
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(block[r]));
                low[r] = _mm512_dpbf16_ps(low[r], x, w0.second);
                high[r] = _mm512_dpbf16_ps(high[r], x, w1.second);
            }
            block += ROWS;
            words += PANEL;
        }
        const __m512 s0 = load(weight.scales + panel * PANEL), s1 = load(weight.scales + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) store(r, _mm512_mul_ps(low[r], s0), _mm512_mul_ps(high[r], s1));
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm* brgemm, Store store) {
        product_by_blocks<WeightInt8>(rows, blocks, first, stop, weight, panel, num_inputs, brgemm, store);
    }
};

// Products along rows of plain bf16, so many numbers at once.
using Numbers = __m512bh;
constexpr int64_t NUMBERS = 32;
inline Numbers load_numbers(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Numbers load_numbers(const bf16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
}
inline F32x16 add_dot(F32x16 sum, Numbers a, Numbers b) { return _mm512_dpbf16_ps(sum, a, b); }
template <int ROWS>
constexpr int OUTPUTS_AT_ONCE = 4;

}  // namespace narrows::NARROWS_TARGET
