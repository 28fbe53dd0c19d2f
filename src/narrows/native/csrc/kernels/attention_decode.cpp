// Attention of single rows, each over a context of its own, read in place from a paged cache.
//
// A unit is up to HEADS query heads that read the same keys, a task one row and some units. A task goes once through
// the context, a block of tokens at a time, which is fetched from memory into the L2 cache while the one before is
// worked on. Latent attention is the case in which all heads read the same key (the slot) and the same value (its
// latent); its queries go through w_uk before and its sums through w_uv after.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/products.h"
#include "kernels/softmax.h"
#include "tile/attention.h"

namespace narrows::NARROWS_TARGET {
namespace {

constexpr int64_t BYTES = 256 << 10;   // of a block of tokens, about: two have to stay in the L2 cache
constexpr int64_t HEADS = MOST_HEADS;  // of a unit

struct Cache {
    const bf16 *keys, *values;
    int64_t key_slot, value_slot, key_head, value_head;  // strides of slots and of key/value heads
    int64_t key_dim, value_dim;                          // columns
};

// Query heads [first, first + num_heads) of a row, which read key/value head `kv`.
struct Unit {
    int64_t first, num_heads, kv;
};

// Into the L2 cache.
inline void fetch(const bf16* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 32) fetch_far(numbers + i);
}

// A block of tokens of one row: where they are, `count` of them, and what their scores and probabilities go to.
struct Tokens {
    const bf16 *keys[TOKENS + 16], *values[TOKENS + 16];
    int64_t count, padded;
    alignas(64) float scores[HEADS * TOKENS];
    alignas(64) Probability p[HEADS * TOKENS];

    void find(const Cache& cache, int64_t kv, const int64_t* slots, int64_t first, int64_t most, int64_t context_len) {
        count = std::min(most, context_len - first);
        padded = (count + 15) / 16 * 16;
        for (int64_t t = 0; t < padded + 16; ++t) {
            const int64_t slot = slots[std::min(first + t, context_len - 1)];
            keys[t] = cache.keys + slot * cache.key_slot + kv * cache.key_head;
            values[t] = cache.values + slot * cache.value_slot + kv * cache.value_head;
        }
    }

    // On to another key/value head of the same tokens.
    void move(int64_t keys_by, int64_t values_by) {
        for (int64_t t = 0; t < padded + 16; ++t) keys[t] += keys_by, values[t] += values_by;
    }

    // `step` is called once for every 16 tokens, and by `add_all` for every 32 columns.
    template <typename Step>
    void score_all(const Query* q, int64_t q_stride, int64_t num_heads, int64_t key_dim, Step step) {
        const auto some = [&]<int H>(int64_t h) [[gnu::always_inline]] {
            for (int64_t t = 0; t < count; t += 16 / H) {
                if (h == 0 && t % 16 == 0) step();
                score<H>(scores + h * TOKENS + t, q + h * q_stride, q_stride, keys + t, key_dim);
            }
        };
        int64_t h = 0;
        for (; h + 4 <= num_heads; h += 4) some.template operator()<4>(h);
        if (h + 2 <= num_heads) some.template operator()<2>(h), h += 2;
        if (h < num_heads) some.template operator()<1>(h);
    }

    template <typename Step>
    void add_all(float* sums, int64_t width, const float* shrink, int64_t num_heads, int64_t value_dim,
                 Step step) const {
        for (int64_t column = 0; column < value_dim; column += 32) {
            step();
            const int64_t there = value_dim - column;
            switch (num_heads) {
#define CASE(N)                                                                       \
    case N:                                                                           \
        add_values<N>(sums + column, width, shrink, p, values, count, column, there); \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
            }
        }
    }
};

// One row: the heads of `units`, whose queries lie at q + head * q_head.
void attend(bf16* out, int64_t out_head, const bf16* q, int64_t q_head, const Cache& cache, const Unit* units,
            int64_t num_units, const int64_t* slots, int64_t context_len, float scale) {
    if (num_units == 0) return;  // a rank without heads
    static thread_local Scratch query_memory, sum_memory, softmax_memory;
    const int64_t q_stride = (cache.key_dim + 31) / 32 * 32, width = panels_of(cache.value_dim) * PANEL;
    Query* queries = query_memory.of<Query>(num_units * HEADS * q_stride);
    float* sums = sum_memory.of<float>(num_units * HEADS * width);
    Softmax* softmax = softmax_memory.of<Softmax>(num_units * HEADS);
    std::fill(sums, sums + num_units * HEADS * width, 0.0f);
    std::fill(softmax, softmax + num_units * HEADS, Softmax{});
    for (int64_t u = 0; u < num_units; ++u) {
        for (int64_t h = 0; h < units[u].num_heads; ++h) {
            Query* to = queries + (u * HEADS + h) * q_stride;
            to_queries(to, q + (units[u].first + h) * q_head, cache.key_dim);
            std::fill(to + cache.key_dim, to + q_stride, Query(0));
        }
    }
    const auto [low, high] = std::minmax_element(units, units + num_units, [](auto a, auto b) { return a.kv < b.kv; });
    const int64_t first_kv = low->kv, more = high->kv - first_kv;
    const int64_t key_span = more * cache.key_head + cache.key_dim,
                  value_span = more * cache.value_head + cache.value_dim;
    const bool apart = cache.values != cache.keys;
    const int64_t slot_bytes = (cache.key_slot + (apart ? cache.value_slot : 0)) * int64_t(sizeof(bf16));
    const int64_t most = std::clamp<int64_t>(BYTES / slot_bytes / 16 * 16, 16, TOKENS);
    int64_t fetched = 0;
    const auto fetch_until = [&](int64_t token) {
        for (; fetched < std::min(token, context_len); ++fetched) {
            fetch(cache.keys + slots[fetched] * cache.key_slot + first_kv * cache.key_head, key_span);
            if (apart)
                fetch(cache.values + slots[fetched] * cache.value_slot + first_kv * cache.value_head, value_span);
        }
    };
    fetch_until(most);
    Tokens tokens;
    for (int64_t first = 0; first < context_len; first += most) {
        tokens.find(cache, first_kv, slots, first, most, context_len);
        const int64_t num_steps = num_units * (tokens.padded / 16 + width / PANEL);
        int64_t steps = 0;
        const auto step = [&] { fetch_until(first + most + ++steps * most / num_steps); };
        int64_t kv = first_kv;
        for (int64_t u = 0; u < num_units; ++u) {
            if (units[u].kv != kv) {
                tokens.move((units[u].kv - kv) * cache.key_head, (units[u].kv - kv) * cache.value_head);
                kv = units[u].kv;
            }
            tokens.score_all(queries + u * HEADS * q_stride, q_stride, units[u].num_heads, cache.key_dim, step);
            float shrink[HEADS];
            for (int64_t h = 0; h < units[u].num_heads; ++h) {
                shrink[h] = take_scores(softmax[u * HEADS + h], tokens.scores + h * TOKENS, tokens.count, tokens.padded,
                                        scale * LOG2E, tokens.p + h * TOKENS);
            }
            tokens.add_all(sums + u * HEADS * width, width, shrink, units[u].num_heads, cache.value_dim, step);
        }
    }
    for (int64_t u = 0; u < num_units; ++u) {
        for (int64_t h = 0; h < units[u].num_heads; ++h) {
            const F32x16 share = set(1.0f / softmax[u * HEADS + h].sum);
            for (int64_t column = 0; column < cache.value_dim; column += 32) {
                ordered(out + (units[u].first + h) * out_head + column, sums + (u * HEADS + h) * width + column, share,
                        cache.value_dim - column);
            }
        }
    }
}

// Rows x [num_rows, num_inputs] of one head times its panels.
void head_product(bf16* out, int64_t out_row, const bf16* x, int64_t x_row, const uint32_t* panels, int64_t num_rows,
                  int64_t num_inputs, int64_t num_outputs) {
    static thread_local Scratch memory;
    const int64_t row_words = Bf16::row_words(num_inputs), num_panels = panels_of(num_outputs);
    const Blocks blocks(num_rows, Bf16::MOST_ROWS);
    uint32_t* packed = memory.of<uint32_t>(num_rows * row_words);
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t start = blocks.start(b), count = blocks.start(b + 1) - start;
        Bf16::pack(
            packed + start * row_words, [&](int64_t r) { return x + (start + r) * x_row; }, count, num_inputs, false);
    }
    for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t column = panel * PANEL;
        const Lanes here = first_lanes(num_outputs - column), next = first_lanes(num_outputs - column - 16);
        Bf16::product(packed, blocks, 0, blocks.count, {panels, nullptr}, panel, num_inputs, nullptr,
                      [&](int64_t row, F32x16 low, F32x16 high) {
                          bf16* to = out + row * out_row + column;
                          store(to, low, here);
                          store(to + 16, high, next);
                      });
    }
}

// Into how many tasks a row's units are cut.
inline int64_t parts_of(int64_t num_units, int num_threads) {
    return std::max<int64_t>(1, std::min<int64_t>(num_units, num_threads));
}

// Runs tasks [0, count) on the threads of the region this is called in, or on the one thread there is.
template <typename Task>
void share_out(int64_t count, int num_threads, Task task) {
    if (num_threads <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace

// Per head x[t, n] @ weight[n]^T: x [num_rows, heads, num_inputs], weights as panels, one head after the other.
void per_head(bf16* out, int64_t out_row, int64_t out_head, const bf16* x, int64_t x_row, int64_t x_head,
              const uint32_t* panels, int64_t num_rows, int64_t num_heads, int64_t num_inputs, int64_t num_outputs,
              int num_threads) {
    if (num_rows == 0) return;
    const int64_t head_size = panels_of(num_outputs) * pairs_of(num_inputs) * PANEL;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    share_out(num_heads, num_threads, [&](int64_t n) {
        head_product(out + n * out_head, out_row, x + n * x_head, x_row, panels + n * head_size, num_rows, num_inputs,
                     num_outputs);
    });
}

// Latent attention of `num_rows` rows: row b of queries and of `out` is row row_of[b] (b where that is null), and reads
// the first lens[b] slots of slots + b * slots_row. `absorb`: panels of w_uk^T, `rank` outputs of `key_dim` inputs;
// `w_uv`: panels of `value_dim` outputs of `rank` inputs. A slot is its latent, then `rope_dim` rotated columns.
void mla_decode(bf16* out, int64_t out_row, const bf16* q_nope, int64_t nope_row, int64_t nope_head, const bf16* q_pe,
                int64_t pe_row, int64_t pe_head, const bf16* cache, int64_t slot_stride, const int64_t* slots,
                int64_t slots_row, const int64_t* lens, const int64_t* row_of, int64_t num_rows, const uint32_t* absorb,
                const uint32_t* w_uv, int64_t num_heads, int64_t key_dim, int64_t rope_dim, int64_t rank,
                int64_t value_dim, float scale, int num_threads) {
    if (num_rows == 0) return;
    static thread_local Scratch query_memory, sum_memory, place_memory, unit_memory;
    const int64_t width = rank + rope_dim;
    bf16* queries = query_memory.of<bf16>(num_rows * num_heads * width);
    bf16* sums = sum_memory.of<bf16>(num_rows * num_heads * rank);
    const Cache held{cache, cache, slot_stride, slot_stride, 0, 0, width, rank};
    const int64_t num_units = (num_heads + HEADS - 1) / HEADS;
    Unit* units = unit_memory.of<Unit>(num_units);
    for (int64_t u = 0; u < num_units; ++u) {
        const int64_t first = u * num_heads / num_units;
        units[u] = {first, (u + 1) * num_heads / num_units - first, 0};
    }
    const int64_t parts = parts_of(num_units, num_threads);
    const int64_t absorb_size = panels_of(rank) * pairs_of(key_dim) * PANEL;
    const int64_t value_size = panels_of(value_dim) * pairs_of(rank) * PANEL;
    const auto at = [&](int64_t b) { return row_of == nullptr ? b : row_of[b]; };
    // Rows of a step's mix are brought together for the products, and scattered after.
    bf16* gathered =
        row_of == nullptr ? nullptr : place_memory.of<bf16>(num_rows * num_heads * std::max(key_dim, value_dim));
    const auto absorbed = [&](int64_t n) {
        const bf16* x = q_nope + n * nope_head;
        int64_t x_row = nope_row;
        if (gathered != nullptr) {
            bf16* mine = gathered + n * num_rows * key_dim;
            for (int64_t b = 0; b < num_rows; ++b) {
                std::memcpy(mine + b * key_dim, x + at(b) * nope_row, key_dim * sizeof(bf16));
            }
            x = mine, x_row = key_dim;
        }
        head_product(queries + n * width, num_heads * width, x, x_row, absorb + n * absorb_size, num_rows, key_dim,
                     rank);
        for (int64_t b = 0; b < num_rows; ++b) {
            std::memcpy(queries + (b * num_heads + n) * width + rank, q_pe + at(b) * pe_row + n * pe_head,
                        rope_dim * sizeof(bf16));
        }
    };
    const auto attended = [&](int64_t i) {
        const int64_t b = i / parts, first = i % parts * num_units / parts, stop = (i % parts + 1) * num_units / parts;
        attend(sums + b * num_heads * rank, rank, queries + b * num_heads * width, width, held, units + first,
               stop - first, slots + b * slots_row, lens[b], scale);
    };
    const auto expanded = [&](int64_t n) {
        const bf16* x = sums + n * rank;
        if (gathered == nullptr) {
            head_product(out + n * value_dim, out_row, x, num_heads * rank, w_uv + n * value_size, num_rows, rank,
                         value_dim);
            return;
        }
        bf16* mine = gathered + n * num_rows * value_dim;
        head_product(mine, value_dim, x, num_heads * rank, w_uv + n * value_size, num_rows, rank, value_dim);
        for (int64_t b = 0; b < num_rows; ++b) {
            std::memcpy(out + at(b) * out_row + n * value_dim, mine + b * value_dim, value_dim * sizeof(bf16));
        }
    };
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        share_out(num_heads, num_threads, absorbed);
        share_out(num_rows * parts, num_threads, attended);
        share_out(num_heads, num_threads, expanded);
    }
}

// Grouped-query attention of `num_rows` rows over keys and values in their caches; rows and slots as above: query
// head n reads key/value head kv_of[n].
void gqa_decode(bf16* out, int64_t out_row, int64_t out_head, const bf16* q, int64_t q_row, int64_t q_head,
                const bf16* key_cache, int64_t key_slot, int64_t key_head, const bf16* value_cache, int64_t value_slot,
                int64_t value_head, const int64_t* slots, int64_t slots_row, const int64_t* lens, const int64_t* row_of,
                int64_t num_rows, const int32_t* kv_of, int64_t num_heads, int64_t key_dim, int64_t value_dim,
                float scale, int num_threads) {
    static thread_local Scratch unit_memory;
    Unit* units = unit_memory.of<Unit>(num_heads);
    int64_t num_units = 0;
    for (int64_t head = 0; head < num_heads; ++head) {
        Unit* last = units + num_units - 1;
        if (num_units > 0 && last->kv == kv_of[head] && last->num_heads < HEADS) {
            ++last->num_heads;
        } else {
            units[num_units++] = {head, 1, kv_of[head]};
        }
    }
    const int64_t parts = parts_of(num_units, num_threads);
    const Cache held{key_cache, value_cache, key_slot, value_slot, key_head, value_head, key_dim, value_dim};
    const auto attended = [&](int64_t i) {
        const int64_t b = i / parts, first = i % parts * num_units / parts, stop = (i % parts + 1) * num_units / parts;
        const int64_t row = row_of == nullptr ? b : row_of[b];
        attend(out + row * out_row, out_head, q + row * q_row, q_head, held, units + first, stop - first,
               slots + b * slots_row, lens[b], scale);
    };
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    share_out(num_rows * parts, num_threads, attended);
}

}  // namespace narrows::NARROWS_TARGET
