// Products with int8 weights: two more kinds for gemm.h, and what tells the three apart.
//
// A weight [N, K] of int8 with a float32 scale per output: panels of 32 outputs as of bf16, [N / 32][K / 4][32][4], four
// neighbouring inputs in a word. Half the bytes of bf16, which is what few rows cost.
//
// Int8: each row is rounded to int8 as it is packed, with a scale of its own (its largest magnitude / 127), and sums are
// exact integers: a row's bits depend on nothing else. The instruction multiplies unsigned numbers with signed ones that
// it can broadcast from memory: so weights are held with 128 added, and 128 times the sum of the row is taken off.
// WeightInt8: rows stay bf16; numbers of the weight become bf16 in registers, which is exact.
#pragma once

#include "gemm.h"

#include <bit>

enum { NARROWS_BF16 = 0, NARROWS_INT8 = 1, NARROWS_WEIGHT_INT8 = 2 };

#if defined(NARROWS_GEMM) && defined(__AVX512VNNI__)
#define NARROWS_GEMM_INT8 1

namespace narrows {

inline int64_t quads_of(int64_t num_inputs) { return (num_inputs + 3) / 4; }

// A row's scale, and 128 times the sum of its numbers.
struct Rounded {
    float scale;
    int32_t offset;
};

// The sum of all lanes, modulo 2^32: what is not finite is rounded to -2^31.
inline uint32_t wrapping_sum(__m512i x) {
    uint32_t lanes[16], sum = 0;
    _mm512_storeu_si512(lanes, x);
    for (const uint32_t lane : lanes) sum += lane;
    return sum;
}

// Rounds a row to int8; `to` has room for 16 numbers more, and is filled up with zeros. Magnitudes are compared as
// integers, of which a NaN is the largest: the scale is then NaN and so are the results. A maximum of floats loses it.
inline Rounded round_row(int8_t* to, const bf16* row, int64_t num_inputs) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        const __m512 size = _mm512_abs_ps(load16(row + k, first_lanes(num_inputs - k)));
        most = _mm512_max_epi32(most, _mm512_castps_si512(size));
    }
    const float largest = std::bit_cast<float>(_mm512_reduce_max_epi32(most));
    const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        const __m512 x = _mm512_mul_ps(load16(row + k, first_lanes(num_inputs - k)), inverse);
        const __m512i rounded = _mm512_cvtps_epi32(x);
        sum = _mm512_add_epi32(sum, rounded);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), _mm512_cvtsepi32_epi8(rounded));
    }
    return {largest / 127.0f, int32_t(128 * wrapping_sum(sum))};
}

struct Int8 {
    static constexpr int64_t MOST_ROWS = 8;  // with 12 the compiler runs out of registers: 1.9 times the time of 8
    static int64_t row_words(int64_t num_inputs) { return quads_of(num_inputs) + 2; }  // the last two: Rounded
    static int64_t panel_words(int64_t num_inputs) { return quads_of(num_inputs); }

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
        const __m512 s0 = load16(weight.scales + panel * PANEL), s1 = load16(weight.scales + panel * PANEL + 16);
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
};

// Four numbers of each lane as two pairs of bf16: exact, since bf16 holds 8 bits.
struct TwoPairs {
    __m512bh first, second;
    explicit TwoPairs(__m512i held) {
        const __m512i quad = _mm512_xor_si512(held, _mm512_set1_epi32(int32_t(0x80808080)));  // 128 less
        const auto number = [&](int byte) {
            return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * byte), 24)));
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
        const __m512 s0 = load16(weight.scales + panel * PANEL), s1 = load16(weight.scales + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) store(r, _mm512_mul_ps(low[r], s0), _mm512_mul_ps(high[r], s1));
    }
};

}  // namespace narrows
#endif

// Calls `work(Kind{})` for a kind by its number.
#ifdef NARROWS_GEMM
template <typename Work>
inline void with_kind(int kind, Work work) {
#ifdef NARROWS_GEMM_INT8
    if (kind == NARROWS_INT8) return work(narrows::Int8{});
    if (kind == NARROWS_WEIGHT_INT8) return work(narrows::WeightInt8{});
#endif
    work(narrows::Bf16{});
}
#endif
