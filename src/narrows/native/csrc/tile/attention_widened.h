// Tiles of attention for targets that have no products of bf16: queries and probabilities are float32, keys and values
// are widened as they are read.
#pragma once

#include "tile/widened.h"

namespace narrows::NARROWS_TARGET {

// What rows are broadcast as: one number.
using Word = float;
constexpr int64_t WORDS_OF_PAIR = 2;
using Probability = float;
using Query = float;

inline void to_queries(Query* to, const bf16* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// `height` rows side by side, at most BLOCK; behind an odd last column there is a zero.
template <typename RowOf>
inline void pack_rows(Word* to, int64_t height, RowOf row_of, int64_t num_columns) {
    pack_wide(reinterpret_cast<uint32_t*>(to), row_of, height, num_columns, 2 * pairs_of(num_columns));
}

// A panel's 32 outputs as rows, in blocks as `Bf16::pack` leaves them: kept until the next call.
inline const Word* as_rows(const uint32_t* panel, int64_t num_pairs) {
    static thread_local Scratch memory;
    float* rows = memory.of<float>(num_pairs * 2 * PANEL);
    const Blocks blocks(PANEL, BLOCK);
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t start = blocks.start(b);
        float* to = rows + start * 2 * num_pairs;
        with_rows<BLOCK>(blocks.start(b + 1) - start, [&]<int ROWS>() {
            // Sixteen at once: those too many are written over by the next ones.
            constexpr int64_t TOO_MANY = (16 + ROWS - 1) / ROWS;
            int64_t p = 0;
            for (; p + TOO_MANY < num_pairs; ++p) {
                const I32x16 both = load_int(panel + p * PANEL + start);
                store(to + 2 * p * ROWS, low_half(both));
                store(to + (2 * p + 1) * ROWS, high_half(both));
            }
            for (; p < num_pairs; ++p) {
                for (int r = 0; r < ROWS; ++r) {
                    const uint32_t both = panel[p * PANEL + start + r];
                    to[2 * p * ROWS + r] = std::bit_cast<float>(both << 16);
                    to[(2 * p + 1) * ROWS + r] = std::bit_cast<float>(both & 0xffff0000);
                }
            }
        });
    }
    return rows;
}

// Adds the products of ROWS rows with one panel. Row r's word w is at rows[r * ROW_STEP + w * STEP]. Meanwhile what
// lies behind the panel is fetched into the L1 cache.
template <int64_t ROW_STEP, int64_t STEP, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_words(F32x16 (&sums)[ROWS][VECTORS], const Word* rows, const uint32_t* panel,
                                             int first, int64_t num_pairs) {
    const Ahead next{reinterpret_cast<const char*>(panel + num_pairs * PANEL + 16 * first), PANEL * 4 / VECTORS};
    add_products(sums, rows, ROW_STEP, STEP, Pairs{panel}, next, first, num_pairs);
}

// Two rows of sixteen numbers as sixteen pairs of bf16.
inline void store_paired(uint32_t* to, F32x16 first, F32x16 second) {
    bf16 low[16], high[16];
    store(low, first);
    store(high, second);
    for (int i = 0; i < 16; ++i) to[i] = low[i] | uint32_t(high[i]) << 16;
}

// All 32 rows of one panel (as_rows) times another panel: 16 rows of pairs of rows.
inline void panel_times_panel(uint32_t* pairs, const Word* rows, const uint32_t* panel, int64_t num_pairs) {
    F32x16 before[2] = {zero(), zero()};
    Bf16::product(reinterpret_cast<const uint32_t*>(rows), Blocks(PANEL, BLOCK), 0, Blocks(PANEL, BLOCK).count,
                  {panel, nullptr}, 0, 2 * num_pairs, nullptr, [&](int64_t row, F32x16 low, F32x16 high) {
                      if (row % 2) {
                          store_paired(pairs + row / 2 * PANEL, before[0], low);
                          store_paired(pairs + row / 2 * PANEL + 16, before[1], high);
                      }
                      before[0] = low, before[1] = high;
                  });
}

// One panel of keys [pairs][32][2] of the tokens at `token[0..31]`, `num_columns` each.
inline void pack_keys(uint32_t* panel, const bf16* const* token, int64_t num_columns) {
    constexpr int64_t SPAN = 16;  // pairs at a time: what is written stays in the cache until its lines are full
    for (int64_t from = 0; from < num_columns; from += 2 * SPAN) {
        const int64_t until = std::min(num_columns, from + 2 * SPAN);
        for (int64_t r = 0; r < PANEL; ++r) {
            for (int64_t c = from; c < until; c += 2) {
                const uint32_t next = c + 1 < num_columns ? token[r][c + 1] : 0;
                panel[c / 2 * PANEL + r] = token[r][c] | next << 16;
            }
        }
    }
}

// Columns [column, column + 32) of values, `there` of them existing, as one panel [num_tokens / 2][32][2]; `num_tokens`
// is even.
inline void pack_values(uint32_t* panel, const bf16* const* token, int64_t num_tokens, int64_t column, int64_t there) {
    const int64_t count = std::min(there, PANEL);
    for (int64_t t = 0; t < num_tokens; t += 2) {
        const bf16 *first = token[t] + column, *second = token[t + 1] + column;
        for (int64_t c = 0; c < count; ++c) panel[c] = first[c] | uint32_t(second[c]) << 16;
        std::fill(panel + count, panel + PANEL, 0);
        panel += PANEL;
    }
}

constexpr int64_t TOKENS = 128;  // most of a block of decode attention
constexpr int MOST_HEADS = 8;    // of a unit

// Scores of H heads (rows of `q`, zeros behind the last column) for 16 / H tokens.
template <int H>
inline void score(float* scores, const Query* q, int64_t q_stride, const bf16* const* token, int64_t num_columns) {
    constexpr int AT_ONCE = TILE_VECTORS == 2 ? 16 / H : std::max(1, 4 / H);  // tokens
    for (int t = 0; t < 16 / H; t += AT_ONCE) {
        F32x16 sums[H][AT_ONCE];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
            for (int i = 0; i < AT_ONCE; ++i) sums[h][i] = zero();
        }
        const auto add = [&](int64_t column, auto load_key) [[gnu::always_inline]] {
#pragma GCC unroll 16
            for (int i = 0; i < AT_ONCE; ++i) {
                const F32x16 key = load_key(token[t + i] + column);
#pragma GCC unroll 4
                for (int h = 0; h < H; ++h) sums[h][i] = mul_add(load(q + h * q_stride + column), key, sums[h][i]);
            }
        };
        int64_t column = 0;
        for (; column + 16 <= num_columns; column += 16) add(column, [](const bf16* p) { return load(p); });
        if (column < num_columns)
            add(column, [&](const bf16* p) { return load(p, first_lanes(num_columns - column)); });
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
            for (int i = 0; i < AT_ONCE; ++i) scores[h * TOKENS + t + i] = reduce_sum(sums[h][i]);
        }
    }
}

// Sums of H heads over 32 columns, `there` of them existing: `sums` shrunk, then the products of probabilities and
// values added.
template <int H>
inline void add_values(float* sums, int64_t sums_stride, const float* shrink, const Probability* p,
                       const bf16* const* token, int64_t num_tokens, int64_t column, int64_t there) {
    constexpr int MOST = std::min(H, TILE_ROWS * TILE_VECTORS / 2 + 1);
    if constexpr (H > MOST) {
        add_values<H / 2>(sums, sums_stride, shrink, p, token, num_tokens, column, there);
        add_values<H - H / 2>(sums + H / 2 * sums_stride, sums_stride, shrink + H / 2, p + H / 2 * TOKENS, token,
                              num_tokens, column, there);
    } else {
        for (int64_t half = 0; half < std::min<int64_t>(there, 32); half += 16) {
            F32x16 held[H];
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h) held[h] = load(sums + h * sums_stride + half) * set(shrink[h]);
            const auto add = [&](auto load_value) [[gnu::always_inline]] {
                for (int64_t t = 0; t < num_tokens; ++t) {
                    const F32x16 value = load_value(token[t] + column + half);
#pragma GCC unroll 8
                    for (int h = 0; h < H; ++h) held[h] = mul_add(set(p[h * TOKENS + t]), value, held[h]);
                }
            };
            if (there - half >= 16)
                add([](const bf16* v) { return load(v); });
            else
                add([&](const bf16* v) { return load(v, first_lanes(there - half)); });
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h) store(sums + h * sums_stride + half, held[h]);
        }
    }
}

// What add_values left of 32 columns, times `share`, rounded.
inline void ordered(bf16* out, const float* sums, F32x16 share, int64_t there) {
    store(out, load(sums) * share, first_lanes(there));
    store(out + 16, load(sums + 16) * share, first_lanes(there - 16));
}

}  // namespace narrows::NARROWS_TARGET
