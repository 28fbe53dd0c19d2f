// Tiles for targets that have no products of bf16: numbers are widened to float32 in registers, as they are read.
//
// Written in sixteen lanes, for any registers: a tile of ROWS rows and VECTORS x 16 outputs of a panel keeps its sums
// there (TILE_ROWS, TILE_VECTORS of simd/). Packed rows are float32, one input after the other. Each result is a chain
// of mul_add over the inputs in order, so that its bits are the same on all of these targets.
#pragma once

#include <algorithm>

#include "kernels/scratch.h"
#include "simd/simd.h"
#include "tile/panels.h"
#include "tile/round_row.h"

namespace narrows::NARROWS_TARGET {

constexpr bool TAKES_BRGEMM = false;
constexpr int64_t BLOCK = TILE_ROWS;  // most rows of a block

// Calls `work.operator()<VECTORS>(first)` until both halves of a panel have had their turn: at once where the sums of
// ROWS rows leave room for it, and for the weights.
template <int ROWS, typename Work>
[[gnu::always_inline]] inline void for_vectors(Work work) {
    if constexpr (TILE_VECTORS == 2 || 2 * ROWS < TILE_ROWS) {
        work.template operator()<2>(0);
    } else {
        work.template operator()<1>(0);
        work.template operator()<1>(1);
    }
}

// A panel of bf16 as it lies in memory: [pairs][32][2].
struct Pairs {
    const uint32_t* at;
    F32x16 even(int vector) const { return low_half(load_int(at + 16 * vector)); }
    F32x16 odd(int vector) const { return high_half(load_int(at + 16 * vector)); }
    void next() { at += PANEL; }
};

// The same widened: [inputs][32].
struct Wide {
    const float* at;
    F32x16 even(int vector) const { return load(at + 16 * vector); }
    F32x16 odd(int vector) const { return load(at + PANEL + 16 * vector); }
    void next() { at += 2 * PANEL; }
};

// What is fetched into the L1 cache meanwhile: `step` bytes further with each vector of a pair.
struct Ahead {
    const char* at;
    int64_t step;
    Ahead after(int64_t vectors) const { return {at + vectors * step, step}; }
    void next() {
        fetch_near(at);
        at += step;
    }
};

// Adds the products of ROWS rows, one number of each, with VECTORS vectors. Row r's number is at rows[r * row_step].
template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_outer(F32x16 (&sums)[ROWS][VECTORS], const float* rows, int64_t row_step,
                                             const F32x16 (&w)[VECTORS]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        const F32x16 x = set(rows[r * row_step]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = add_product(sums[r][v], x, w[v]);
    }
}

// Adds the products of ROWS rows with VECTORS vectors of a panel. Row r's input k is at rows[r * row_step + k * step].
template <int ROWS, int VECTORS, typename Weights>
[[gnu::always_inline]] inline void add_products(F32x16 (&sums)[ROWS][VECTORS], const float* rows, int64_t row_step,
                                                int64_t step, Weights weights, Ahead ahead, int first,
                                                int64_t num_pairs) {
    for (int64_t p = 0; p < num_pairs; ++p) {
        F32x16 w[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            ahead.next();
            w[v] = weights.even(first + v);
        }
        add_outer(sums, rows, row_step, w);
        rows += step;
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) w[v] = weights.odd(first + v);
        add_outer(sums, rows, row_step, w);
        rows += step;
        weights.next();
    }
}

// The same, onto sums [rows][32] in memory.
template <int ROWS, typename Weights>
inline void add_to_sums(float* sums, const float* rows, Weights weights, Ahead ahead, int64_t num_pairs) {
    for_vectors<ROWS>([&]<int VECTORS>(int first) [[gnu::always_inline]] {
        F32x16 held[ROWS][VECTORS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) held[r][v] = load(sums + r * PANEL + 16 * (first + v));
        }
        add_products(held, rows, 1, ROWS, weights, ahead.after(first * num_pairs), first, num_pairs);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) store(sums + r * PANEL + 16 * (first + v), held[r][v]);
        }
    });
}

// Blocks that meet a piece of a panel while it is in the L1 cache, and how many pairs of inputs, at most, are a piece.
constexpr int64_t TOGETHER = 8, PIECE = 64;

// Sums of blocks [first, stop) of float32 rows with one panel of `pair_bytes` bytes a pair, in groups.
// `piece_of(pairs from, pairs, blocks, work)` calls `work` with the weights of a piece, Pairs or Wide. Meanwhile the
// next piece is fetched, each block a part of it, so that memory is never at rest.
template <typename PieceOf, typename Store>
inline void product_in_pieces(const float* rows, const Blocks& blocks, int64_t first, int64_t stop, int64_t num_pairs,
                              const char* panel, int64_t pair_bytes, PieceOf piece_of, Store store_row) {
    const int64_t base = blocks.start(first);
    alignas(64) float sums[TOGETHER * BLOCK * PANEL];
    for (int64_t group = first; group < stop; group += TOGETHER) {
        const int64_t end = std::min(stop, group + TOGETHER), start = blocks.start(group);
        const int64_t count = blocks.start(end) - start;
        std::fill(sums, sums + count * PANEL, 0.0f);
        for (int64_t from = 0; from < num_pairs; from += PIECE) {
            const int64_t pairs = std::min(PIECE, num_pairs - from);
            piece_of(from, pairs, end - group, [&](auto weights) {
                Ahead ahead{panel + (from + PIECE) * pair_bytes, pair_bytes / 2 / (end - group)};
                for (int64_t b = group; b < end; ++b) {
                    const int64_t row = blocks.start(b), height = blocks.start(b + 1) - row;
                    const float* x = rows + (row - base) * 2 * num_pairs + from * 2 * height;
                    with_rows<BLOCK>(height, [&]<int ROWS>() {
                        add_to_sums<ROWS>(sums + (row - start) * PANEL, x, weights, ahead, pairs);
                    });
                    ahead = ahead.after(2 * pairs);
                }
            });
        }
        for (int64_t r = 0; r < count; ++r) store_row(start + r, load(sums + r * PANEL), load(sums + r * PANEL + 16));
    }
}

// Packs rows as float32, [inputs][rows], zeros behind the last up to `padded`.
template <typename RowOf>
inline void pack_wide(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, int64_t padded) {
    float* to = reinterpret_cast<float*>(block);
    with_rows<BLOCK>(num_rows, [&]<int ROWS>() {
        const bf16* row[ROWS];
        for (int r = 0; r < ROWS; ++r) row[r] = row_of(r);
        int64_t k = 0;
        for (; k + 16 <= num_inputs; k += 16) {
            F32x16 numbers[ROWS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) numbers[r] = load(row[r] + k);
            store_columns(to + k * ROWS, numbers);
        }
        for (; k < padded; ++k) {
            for (int r = 0; r < ROWS; ++r) to[k * ROWS + r] = k < num_inputs ? to_float(row[r][k]) : 0.0f;
        }
    });
}

struct Bf16 {
    static constexpr int64_t MOST_ROWS = BLOCK;
    static int64_t row_words(int64_t num_inputs) { return 2 * pairs_of(num_inputs); }
    static int64_t panel_words(int64_t num_inputs) { return pairs_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        pack_wide(block, row_of, num_rows, num_inputs, 2 * pairs_of(num_inputs));
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm*, Store store_row) {
        const int64_t num_pairs = pairs_of(num_inputs);
        const uint32_t* words = weight.panels + panel * num_pairs * PANEL;
        alignas(64) float wide[PIECE * 2 * PANEL];
        const auto piece_of = [&](int64_t from, int64_t pairs, int64_t num_blocks, auto work) {
            const uint32_t* piece = words + from * PANEL;
            // Else widening takes about the time of a block's products with half of the rows.
            if (WIDENS_FOR_FREE || num_blocks < 3) return work(Pairs{piece});
            for (int64_t i = 0; i < pairs * PANEL; i += 16) {
                const I32x16 both = load_int(piece + i);
                float* to = wide + i / PANEL * 2 * PANEL + i % PANEL;
                store(to, low_half(both));
                store(to + PANEL, high_half(both));
            }
            work(Wide{wide});
        };
        product_in_pieces(reinterpret_cast<const float*>(rows), blocks, first, stop, num_pairs,
                          reinterpret_cast<const char*>(words), PANEL * 4, piece_of, store_row);
    }
};

struct WeightInt8 {
    static constexpr int64_t MOST_ROWS = BLOCK;
    static int64_t row_words(int64_t num_inputs) { return 4 * quads_of(num_inputs); }
    static int64_t panel_words(int64_t num_inputs) { return quads_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        pack_wide(block, row_of, num_rows, num_inputs, 4 * quads_of(num_inputs));
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm*, Store store_row) {
        const int64_t num_quads = quads_of(num_inputs);
        const uint32_t* words = weight.panels + panel * num_quads * PANEL;
        alignas(64) float wide[PIECE * 2 * PANEL];
        const auto piece_of = [&](int64_t from, int64_t pairs, int64_t, auto work) {
            for (int64_t i = 0; i < pairs / 2 * PANEL; i += 16) {
                const I32x16 quads = load_int(words + from / 2 * PANEL + i);
                float* to = wide + i / PANEL * 4 * PANEL + i % PANEL;
                for (int byte = 0; byte < 4; ++byte)  // 128 is added there
                    store(to + byte * PANEL, to_floats(byte_of(quads, byte) - set_int(128)));
            }
            work(Wide{wide});
        };
        const F32x16 low_scale = load(weight.scales + panel * PANEL),
                     high_scale = load(weight.scales + panel * PANEL + 16);
        product_in_pieces(
            reinterpret_cast<const float*>(rows), blocks, first, stop, 2 * num_quads,
            reinterpret_cast<const char*>(words), PANEL * 2, piece_of,
            [&](int64_t row, F32x16 low, F32x16 high) { store_row(row, low * low_scale, high * high_scale); });
    }
};

// Rows of int8, as two words of int16 for each four inputs: inputs 0 and 2, then 1 and 3, since that is how a register
// splits into halves. Products of int16 in pairs are exact; those of bytes (maddubs) would saturate.
struct Int8 {
    static constexpr int64_t MOST_ROWS = BLOCK;
    static int64_t row_words(int64_t num_inputs) { return 2 * quads_of(num_inputs) + 2; }  // the last two: Rounded
    static int64_t panel_words(int64_t num_inputs) { return quads_of(num_inputs); }
    static int64_t panel_size(const Packed&, int64_t num_inputs) { return panel_words(num_inputs) * PANEL; }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        static thread_local Scratch for_row;
        const int64_t num_quads = quads_of(num_inputs);
        int8_t* numbers = for_row.of<int8_t>(num_inputs + 16);
        const auto word = [](int8_t first, int8_t second) {
            return uint32_t(uint16_t(int16_t(first))) | uint32_t(uint16_t(int16_t(second))) << 16;
        };
        for (int64_t r = 0; r < num_rows; ++r) {
            const Rounded of_row = round_row(numbers, row_of(r), num_inputs);
            for (int64_t q = 0; q < num_quads; ++q) {
                block[2 * q * num_rows + r] = word(numbers[4 * q], numbers[4 * q + 2]);
                block[(2 * q + 1) * num_rows + r] = word(numbers[4 * q + 1], numbers[4 * q + 3]);
            }
            std::memcpy(block + 2 * num_quads * num_rows + r, &of_row.scale, 4);
            std::memcpy(block + (2 * num_quads + 1) * num_rows + r, &of_row.offset, 4);
        }
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm*, Store store_row) {
        const int64_t num_quads = quads_of(num_inputs), base = blocks.start(first);
        const uint32_t* words = weight.panels + panel * num_quads * PANEL;
        const float* scales = weight.scales + panel * PANEL;
        for (int64_t b = first; b < stop; ++b) {
            const int64_t start = blocks.start(b), height = blocks.start(b + 1) - start;
            const uint32_t* block = rows + (start - base) * row_words(num_inputs);
            alignas(64) float results[BLOCK * PANEL];
            with_rows<BLOCK>(height, [&]<int ROWS>() { multiply<ROWS>(results, block, words, scales, num_quads); });
            for (int64_t r = 0; r < height; ++r)
                store_row(start + r, load(results + r * PANEL), load(results + r * PANEL + 16));
        }
    }

 private:
    template <int ROWS>
    static void multiply(float* results, const uint32_t* block, const uint32_t* words, const float* scales,
                         int64_t num_quads) {
        for_vectors<ROWS>([&]<int VECTORS>(int first) [[gnu::always_inline]] {
            I32x16 sums[ROWS][VECTORS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero_int();
            }
            const uint32_t* x = block;
            const uint32_t* w = words + 16 * first;
            for (int64_t q = 0; q < num_quads; ++q) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) {
                    const I32x16 quads = load_int(w + 16 * v), even = even_bytes(quads), odd = odd_bytes(quads);
                    fetch_near(w + 16 * v + 2048);
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; ++r) {
                        sums[r][v] = mul_add_pairs(even, set_int(int32_t(x[r])), sums[r][v]);
                        sums[r][v] = mul_add_pairs(odd, set_int(int32_t(x[ROWS + r])), sums[r][v]);
                    }
                }
                x += 2 * ROWS;
                w += PANEL;
            }
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const F32x16 of_row = set(std::bit_cast<float>(x[r]));
                const I32x16 offset = set_int(int32_t(x[ROWS + r]));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) {
                    const int at = 16 * (first + v);
                    store(results + r * PANEL + at, to_floats(sums[r][v] - offset) * (load(scales + at) * of_row));
                }
            }
        });
    }
};

// Products along rows of plain bf16, so many numbers at once.
using Numbers = F32x16;
constexpr int64_t NUMBERS = 16;
inline Numbers load_numbers(const bf16* p) { return load(p); }
inline Numbers load_numbers(const bf16* p, int64_t count) { return load(p, first_lanes(count)); }
inline F32x16 add_dot(F32x16 sum, Numbers a, Numbers b) { return add_product(sum, a, b); }
template <int ROWS>
constexpr int OUTPUTS_AT_ONCE = std::clamp(TILE_ROWS * TILE_VECTORS / ROWS, 1, 4);

}  // namespace narrows::NARROWS_TARGET
