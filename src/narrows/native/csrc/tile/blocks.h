// Weights in blocks of 4 to 8 bits as GGUF files store them, multiplied in place, with rows of int8.
//
// A panel holds the blocks of its 32 outputs side by side: of each block of inputs first what are halves (float16), 32
// of each, then its words, 32 of each; no byte more than the file has. ops/blocks.py has the order of the parts.
//
// Each weight is `scale * code - min`, with a code that is an unsigned byte and a scale and a min for 16 or 32 inputs.
// Rows are rounded to int8 as they are packed, each group of 32 inputs with a scale of its own (its largest magnitude /
// 127). So a group's sums of products are exact integers, and what is added in float32 is
//
//     scale * scale of the row * sum(code * number)  -  min * scale of the row * sum(number)
//
// group after group: one chain for each result. All that is written in sixteen lanes: the same bits wherever mul_add
// is.
//
// One block of rows: codes are taken apart in registers, as the panel is read from front to back. More: a piece of 256
// inputs is taken apart once, stays in the L1 cache, and up to 96 rows meet it there.
#pragma once

#include <algorithm>

#include "kernels/scratch.h"
#include "simd/simd.h"
#include "tile/panels.h"
#include "tile/round_row.h"

namespace narrows::NARROWS_TARGET {

constexpr int64_t GROUP = 32;        // inputs that share a scale of the row
constexpr int64_t GROUP_WORDS = 12;  // of a packed row: 8 of numbers, its scale, then scale * sum of the numbers: of
                                     // the first half, the second, and both
constexpr int64_t GROUPS = 8;        // of a piece

// A kind of block: INPUTS of it, which BYTES hold, and scales for every GROUP / PARTS inputs.
//   scales   writes them for all 32 outputs, [INPUTS * PARTS / GROUP][32], and mins likewise (MINS: there are any)
//   codes    of a vector of outputs, for four inputs of a group
struct BlocksQ4_0 {
    static constexpr int64_t INPUTS = 32, BYTES = 18, PARTS = 1;
    static constexpr bool MINS = true, SIGNED = false;
    static void scales(const uint32_t* block, float* scale, float* min) {
        for (int v = 0; v < PANEL; v += 16) {
            const F32x16 d = load_f16(reinterpret_cast<const uint16_t*>(block) + v);
            store(scale + v, d);
            store(min + v, set(8.0f) * d);
        }
    }
    static I32x16 codes(const uint32_t* block, int64_t, int quad, int vector) {
        const I32x16 both = load_int(block + PANEL / 2 + quad % 4 * PANEL + 16 * vector);
        return shift_right(both, quad / 4 * 4) & set_int(0x0f0f0f0f);
    }
};

struct BlocksQ8_0 {
    static constexpr int64_t INPUTS = 32, BYTES = 34, PARTS = 1;
    static constexpr bool SIGNED = !DOTS_ANY_BYTE, MINS = !SIGNED;
    static void scales(const uint32_t* block, float* scale, float* min) {
        for (int v = 0; v < PANEL; v += 16) {
            const F32x16 d = load_f16(reinterpret_cast<const uint16_t*>(block) + v);
            store(scale + v, d);
            if (MINS) store(min + v, set(128.0f) * d);
        }
    }
    static I32x16 codes(const uint32_t* block, int64_t, int quad, int vector) {
        const I32x16 held = load_int(block + PANEL / 2 + quad * PANEL + 16 * vector);
        return SIGNED ? held : held ^ set_int(int32_t(0x80808080));  // 128 more
    }
};

// Scales and mins of eight groups are 6 bits each, in 12 bytes.
struct SixBits {
    I32x16 scales[2], mins[2];  // four bytes each
    explicit SixBits(const uint32_t* words, int vector) {
        const I32x16 low = load_int(words + 16 * vector), middle = load_int(words + PANEL + 16 * vector);
        const I32x16 high = load_int(words + 2 * PANEL + 16 * vector);
        const I32x16 six = set_int(0x3f3f3f3f), four = set_int(0x0f0f0f0f), two = set_int(0x30303030);
        scales[0] = low & six;
        scales[1] = (high & four) | (shift_right(low, 2) & two);
        mins[0] = middle & six;
        mins[1] = (shift_right(high, 4) & four) | (shift_right(middle, 2) & two);
    }
};

// What Q4_K and Q5_K share. HEADER: words before the halves of the codes.
template <int64_t HEADER>
struct BlocksOfSixBits {
    static constexpr int64_t INPUTS = 256, PARTS = 1;
    static constexpr bool MINS = true, SIGNED = false;
    static void scales(const uint32_t* block, float* scale, float* min) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(block);
        for (int v = 0; v < 2; ++v) {
            const F32x16 d = load_f16(halves + 16 * v), least = load_f16(halves + PANEL + 16 * v);
            const SixBits bytes(block + PANEL, v);
            for (int g = 0; g < 8; ++g) {
                store(scale + g * PANEL + 16 * v, to_floats(byte_of(bytes.scales[g / 4], g % 4)) * d);
                store(min + g * PANEL + 16 * v, to_floats(byte_of(bytes.mins[g / 4], g % 4)) * least);
            }
        }
    }
    static I32x16 low_bits(const uint32_t* block, int64_t group, int quad, int vector) {
        const I32x16 both = load_int(block + (HEADER + group / 2 * 8 + quad) * PANEL + 16 * vector);
        return shift_right(both, group % 2 * 4) & set_int(0x0f0f0f0f);
    }
};

struct BlocksQ4_K : BlocksOfSixBits<4> {
    static constexpr int64_t BYTES = 144;
    static I32x16 codes(const uint32_t* block, int64_t group, int quad, int vector) {
        return low_bits(block, group, quad, vector);
    }
};

struct BlocksQ5_K : BlocksOfSixBits<12> {
    static constexpr int64_t BYTES = 176;
    static I32x16 codes(const uint32_t* block, int64_t group, int quad, int vector) {
        const I32x16 bits = load_int(block + (4 + quad) * PANEL + 16 * vector);
        return low_bits(block, group, quad, vector) | shift_left(shift_right(bits, group) & set_int(0x01010101), 4);
    }
};

struct BlocksQ6_K {
    static constexpr int64_t INPUTS = 256, BYTES = 210, PARTS = 2;
    static constexpr bool MINS = true, SIGNED = false;
    static void scales(const uint32_t* block, float* scale, float* min) {
        for (int v = 0; v < 2; ++v) {
            const F32x16 d = load_f16(reinterpret_cast<const uint16_t*>(block) + 16 * v);
            for (int s = 0; s < 16; ++s) {
                // Bytes are signed: without their sign, and less twice its value.
                const I32x16 byte = byte_of(load_int(block + PANEL / 2 + s / 4 * PANEL + 16 * v), s % 4);
                const F32x16 of_part = to_floats(byte - shift_left(byte & set_int(0x80), 1)) * d;
                store(scale + s * PANEL + 16 * v, of_part);
                store(min + s * PANEL + 16 * v, set(32.0f) * of_part);
            }
        }
    }
    static I32x16 codes(const uint32_t* block, int64_t group, int quad, int vector) {
        const uint32_t *low = block + PANEL / 2 + 4 * PANEL, *high = low + 32 * PANEL;
        const int64_t half = group / 4, turn = group % 4;
        const I32x16 four = load_int(low + (half * 16 + turn % 2 * 8 + quad) * PANEL + 16 * vector);
        const I32x16 two = load_int(high + (half * 8 + quad) * PANEL + 16 * vector);
        return (shift_right(four, turn / 2 * 4) & set_int(0x0f0f0f0f)) |
               shift_left(shift_right(two, 2 * turn) & set_int(0x03030303), 4);
    }
};

// What the products of a taken piece need to know of a kind of block.
template <int64_t OF_PARTS, bool WITH_MINS, bool WITH_SIGNS>
struct TakenApart {
    static constexpr int64_t PARTS = OF_PARTS;
    static constexpr bool MINS = WITH_MINS, SIGNED = WITH_SIGNS;
};

// How many vectors of outputs a tile of ROWS rows multiplies at once: as many sums of floats as of products.
constexpr int64_t STORED_ROWS = TILE_ROWS * TILE_VECTORS / 2;
template <int ROWS>
constexpr int VECTORS_AT_ONCE = 2 * ROWS <= STORED_ROWS ? 2 : 1;

// Adds a group's products of ROWS rows with VECTORS vectors of outputs, of which the first is `first`.
// `code_of(quad, vector)` gives the codes.
template <typename Format, int ROWS, int VECTORS, typename CodeOf>
[[gnu::always_inline]] inline void add_group(F32x16 (&sums)[ROWS][VECTORS], const uint32_t* rows, const float* scales,
                                             const float* mins, int first, CodeOf code_of) {
    constexpr int PARTS = Format::PARTS, QUADS = 8 / PARTS;
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; ++part) {
        I32x16 dots[ROWS][VECTORS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) dots[r][v] = zero_int();
        }
#pragma GCC unroll 8
        for (int q = 0; q < QUADS; ++q) {
            I32x16 codes[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) codes[v] = code_of(part * QUADS + q, first + v);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const I32x16 x = set_int(int32_t(rows[(part * QUADS + q) * ROWS + r]));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) {
                    dots[r][v] =
                        Format::SIGNED ? dot_signed_bytes(dots[r][v], codes[v], x) : dot_bytes(dots[r][v], codes[v], x);
                }
            }
        }
        const float* of_rows = reinterpret_cast<const float*>(rows) + 8 * ROWS;
        const float* row_sums = of_rows + (PARTS == 1 ? 3 : 1 + part) * ROWS;
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            const F32x16 scale = load(scales + part * PANEL + 16 * (first + v));
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r)
                sums[r][v] = add_product(sums[r][v], to_floats(dots[r][v]) * scale, set(of_rows[r]));
            if constexpr (Format::MINS) {
                const F32x16 min = load(mins + part * PANEL + 16 * (first + v));
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; ++r) sums[r][v] = neg_mul_add(min, set(row_sums[r]), sums[r][v]);
            }
        }
    }
}

struct InBlocks {
    static constexpr int64_t MOST_ROWS = STORED_ROWS;

    // Calls `work(Format{})` for a kind of block by its number.
    template <typename Work>
    static void with_format(int kind, Work work) {
        if (kind == Q4_0) return work(BlocksQ4_0{});
        if (kind == Q8_0) return work(BlocksQ8_0{});
        if (kind == Q4_K) return work(BlocksQ4_K{});
        if (kind == Q5_K) return work(BlocksQ5_K{});
        work(BlocksQ6_K{});
    }

    static int64_t row_words(int64_t num_inputs) { return num_inputs / GROUP * GROUP_WORDS; }
    static int64_t panel_size(const Packed& weight, int64_t num_inputs) {
        int64_t words = 0;
        with_format(weight.kind,
                    [&]<typename Format>(Format) { words = num_inputs / Format::INPUTS * Format::BYTES * PANEL / 4; });
        return words;
    }

    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool) {
        for (int64_t r = 0; r < num_rows; ++r) {
            const bf16* row = row_of(r);
            for (int64_t k = 0; k < num_inputs; k += GROUP)
                pack_group(block + k / GROUP * GROUP_WORDS * num_rows + r, num_rows, row + k);
        }
    }

    template <typename Store>
    static void product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                        int64_t panel, int64_t num_inputs, const Brgemm*, Store store_row) {
        const uint32_t* words = weight.panels + panel * panel_size(weight, num_inputs);
        const int64_t start = blocks.start(first), count = blocks.start(stop) - start, groups = num_inputs / GROUP;
        alignas(64) float sums[TOGETHER * MOST_ROWS * PANEL];
        with_format(weight.kind, [&]<typename Format>(Format) {
            if (stop - first == 1) {
                with_rows<MOST_ROWS>(count, [&]<int ROWS>() { one_block<Format, ROWS>(sums, rows, words, groups); });
                for (int64_t r = 0; r < count; ++r)
                    store_row(start + r, load(sums + r * PANEL), load(sums + r * PANEL + 16));
                return;
            }
            for (int64_t group = first; group < stop; group += TOGETHER) {
                const int64_t end = std::min(stop, group + TOGETHER), row = blocks.start(group);
                many<Format>(sums, rows + (row - start) * row_words(num_inputs), words, groups, blocks, group, end);
                for (int64_t r = 0; r < blocks.start(end) - row; ++r)
                    store_row(row + r, load(sums + r * PANEL), load(sums + r * PANEL + 16));
            }
        });
    }

 private:
    static constexpr int64_t TOGETHER = 96 / MOST_ROWS;  // blocks that meet a piece

    // Rounds 32 numbers. Magnitudes are compared as integers, so that a NaN is the largest (round_row.h).
    static void pack_group(uint32_t* to, int64_t step, const bf16* x) {
        constexpr float LEAST = 1e-35f;  // numbers below are zeros: 127 divided by them may be infinite
        const F32x16 low = load(x), high = load(x + 16);
        const float largest = std::bit_cast<float>(reduce_max(max(bits_of(abs(low)), bits_of(abs(high)))));
        const F32x16 inverse = set(largest > LEAST ? 127.0f / largest : 0.0f);
        const I32x16 first = rounded(low * inverse), second = rounded(high * inverse);
        int8_t numbers[GROUP];
        store_i8(numbers, first, first_lanes(16));
        store_i8(numbers + 16, second, first_lanes(16));
        for (int q = 0; q < 8; ++q) std::memcpy(to + q * step, numbers + 4 * q, 4);
        const float scale = largest / 127.0f, sums[2] = {reduce_sum(to_floats(first)), reduce_sum(to_floats(second))};
        const float last[4] = {scale, scale * sums[0], scale * sums[1], scale * (sums[0] + sums[1])};
        for (int i = 0; i < 4; ++i) std::memcpy(to + (8 + i) * step, last + i, 4);
    }

    template <typename Format>
    static constexpr int64_t BLOCK_WORDS = Format::BYTES * PANEL / 4;
    template <typename Format>
    static constexpr int64_t BLOCK_GROUPS = Format::INPUTS / GROUP;

    template <typename Format>
    struct Scales {
        alignas(64) float scales[GROUPS * Format::PARTS * PANEL], mins[GROUPS * Format::PARTS * PANEL];
        Scales(const uint32_t* piece, int64_t groups) {
            constexpr int64_t NUMBERS = BLOCK_GROUPS<Format> * Format::PARTS * PANEL;
            for (int64_t b = 0; b < groups / BLOCK_GROUPS<Format>; ++b)
                Format::scales(piece + b * BLOCK_WORDS<Format>, scales + b * NUMBERS, mins + b * NUMBERS);
        }
    };

    template <typename Format>
    [[gnu::always_inline]] static const uint32_t* block_of(const uint32_t* piece, int64_t group) {
        return piece + group / BLOCK_GROUPS<Format> * BLOCK_WORDS<Format>;
    }

    template <typename Format>
    static constexpr int64_t GROUP_LINES = (BLOCK_WORDS<Format> / BLOCK_GROUPS<Format> + 15) / 16;

    // Not inlined, as in avx512bf16.h: else sums are kept on the stack.
    template <typename Format, int ROWS>
    [[gnu::noinline]] static void one_block(float* to, const uint32_t* rows, const uint32_t* words,
                                            int64_t num_groups) {
        constexpr int64_t AHEAD = 12288, LINES = GROUP_LINES<Format>, VECTORS = VECTORS_AT_ONCE<ROWS>;
        for (int first = 0; first < 2; first += VECTORS) {
            F32x16 sums[ROWS][VECTORS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero();
            }
            const uint32_t* x = rows;
            for (int64_t from = 0; from < num_groups; from += GROUPS) {
                const int64_t groups = std::min(GROUPS, num_groups - from);
                const uint32_t* piece = words + from / BLOCK_GROUPS<Format> * BLOCK_WORDS<Format>;
                const Scales<Format> of(piece, groups);
                const char* ahead = reinterpret_cast<const char*>(piece) + AHEAD;
                for (int64_t g = 0; g < groups; ++g) {
                    const uint32_t* block = block_of<Format>(piece, g);
                    add_group<Format, ROWS, VECTORS>(
                        sums, x, of.scales + g * Format::PARTS * PANEL, of.mins + g * Format::PARTS * PANEL, first,
                        [&](int quad, int v) [[gnu::always_inline]] {
                            if (v == 0) {
                                for (int64_t i = quad * LINES / 8; i < (quad + 1) * LINES / 8; ++i)
                                    fetch_far(ahead + i * 64);
                            }
                            return Format::codes(block, g % BLOCK_GROUPS<Format>, quad, v);
                        });
                    ahead += LINES * 64;
                    x += GROUP_WORDS * ROWS;
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < VECTORS; ++v) store(to + r * PANEL + 16 * (first + v), sums[r][v]);
            }
        }
    }

    // Blocks of rows [group, end), at most TOGETHER.
    template <typename Format>
    static void many(float* sums, const uint32_t* rows, const uint32_t* words, int64_t num_groups, const Blocks& blocks,
                     int64_t group, int64_t end) {
        using Taken = TakenApart<Format::PARTS, Format::MINS, Format::SIGNED>;
        alignas(64) uint32_t codes[GROUPS * 8 * PANEL];
        const int64_t start = blocks.start(group);
        std::fill(sums, sums + (blocks.start(end) - start) * PANEL, 0.0f);
        for (int64_t from = 0; from < num_groups; from += GROUPS) {
            const int64_t groups = std::min(GROUPS, num_groups - from);
            const uint32_t* piece = words + from / BLOCK_GROUPS<Format> * BLOCK_WORDS<Format>;
            const Scales<Format> of(piece, groups);
            for (int64_t g = 0; g < groups; ++g) {
                const uint32_t* block = block_of<Format>(piece, g);
                for (int q = 0; q < 8; ++q) {
                    for (int v = 0; v < 2; ++v)
                        store(reinterpret_cast<int32_t*>(codes + (g * 8 + q) * PANEL + 16 * v),
                              Format::codes(block, g % BLOCK_GROUPS<Format>, q, v));
                }
            }
            // Each block fetches its part of the next piece.
            const char* next =
                reinterpret_cast<const char*>(words + (from + GROUPS) / BLOCK_GROUPS<Format> * BLOCK_WORDS<Format>);
            const int64_t lines = (groups * GROUP_LINES<Format> + end - group - 1) / (end - group);
            for (int64_t b = group; b < end; ++b) {
                const int64_t row = blocks.start(b) - start, height = blocks.start(b + 1) - start - row;
                const uint32_t* x = rows + (row * num_groups + from * height) * GROUP_WORDS;
                for (int64_t line = 0; line < lines; ++line) fetch_near(next + ((b - group) * lines + line) * 64);
                with_rows<MOST_ROWS>(height, [&]<int ROWS>() {
                    add_piece<Taken, ROWS>(sums + row * PANEL, x, codes, of.scales, of.mins, groups);
                });
            }
        }
    }

    template <typename Taken, int ROWS>
    [[gnu::noinline]] static void add_piece(float* sums, const uint32_t* rows, const uint32_t* codes,
                                            const float* scales, const float* mins, int64_t num_groups) {
        constexpr int VECTORS = VECTORS_AT_ONCE<ROWS>;
        for (int first = 0; first < 2; first += VECTORS) {
            F32x16 held[ROWS][VECTORS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) held[r][v] = load(sums + r * PANEL + 16 * (first + v));
            }
            for (int64_t g = 0; g < num_groups; ++g) {
                const uint32_t* of_group = codes + g * 8 * PANEL;
                add_group<Taken, ROWS, VECTORS>(
                    held, rows + g * GROUP_WORDS * ROWS, scales + g * Taken::PARTS * PANEL,
                    mins + g * Taken::PARTS * PANEL, first,
                    [&](int quad, int v) [[gnu::always_inline]] { return load_int(of_group + quad * PANEL + 16 * v); });
            }
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) store(sums + r * PANEL + 16 * (first + v), held[r][v]);
            }
        }
    }
};

}  // namespace narrows::NARROWS_TARGET
