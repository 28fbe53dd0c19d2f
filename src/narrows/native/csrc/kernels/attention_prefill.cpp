// Causal attention of the last rows of one context over all of it, in blocks: neither all scores nor, for latent
// attention, all expanded keys and values are ever in memory.
//
// For each head, and for each block of KEYS tokens: its panels of keys and values are made (packed from the cache, or
// multiplied from the latents), then every group of rows that sees some of the block meets it.
//
// On CPUs with AMX the products are another library's (`Brgemm`), of the same panels with rows in order.
#include <omp.h>

#include <algorithm>

#include "kernels/products.h"
#include "kernels/softmax.h"
#include "tile/attention.h"

namespace narrows::NARROWS_TARGET {
namespace {

constexpr int64_t KEYS = 256;  // tokens of a block: its values' panel stays in the L1 cache
constexpr int64_t KEY_PANELS = KEYS / PANEL;
constexpr int64_t SUMS = 4 << 20;   // most sums in float32 kept at once, for heads that share their keys
constexpr int64_t GROUP_ROWS = 48;  // rows, some blocks of them, that meet a panel of keys while it is in the L1 cache
static_assert(GROUP_ROWS % BLOCK == 0 && BLOCK % 3 == 0);

constexpr int64_t words_of(int64_t num_pairs) { return num_pairs * WORDS_OF_PAIR; }

// Addresses of the tokens of a block; those beyond the context are its last one (their scores are never looked at).
inline void addresses(const bf16** token, const bf16* cache, int64_t slot_stride, const int64_t* slots, int64_t first,
                      int64_t count, int64_t context_len) {
    for (int64_t t = 0; t < count; ++t) token[t] = cache + slots[std::min(first + t, context_len - 1)] * slot_stride;
}

// Panels of one block of tokens: keys in two parts (the second is shared by all heads, or absent), and values.
struct Panels {
    const uint32_t *keys, *shared_keys, *values;
    int64_t key_pairs, shared_pairs, value_panels;
};

// Memory for the queries, sums and softmax of rows of some heads, and for one group's scores and probabilities.
class Rows {
 public:
    void begin(int64_t num_heads, int64_t num_rows, int64_t num_pairs, int64_t value_panels, const Brgemm* brgemm) {
        brgemm_ = brgemm;
        num_rows_ = num_rows;
        num_pairs_ = num_pairs;
        width_ = value_panels * PANEL;
        const int64_t padded = (num_rows + BLOCK - 1) / BLOCK * BLOCK;
        queries_ = q_.of<Word>(num_heads * padded * words_of(num_pairs));
        sums_ = o_.of<float>(num_heads * padded * width_);
        std::fill(sums_, sums_ + num_heads * padded * width_, 0.0f);
        softmax_ = m_.of<Softmax>(num_heads * padded);
        std::fill(softmax_, softmax_ + num_heads * padded, Softmax{});
        scores_ = s_.of<float>(GROUP_ROWS * KEYS);
        p_ = p_memory_.of<Probability>(GROUP_ROWS * KEYS);
        padded_ = padded;
    }

    // Queries of one head: two parts side by side, the first in `first_pairs` pairs.
    void queries(int64_t head, const bf16* first, int64_t first_stride, int64_t num_first, int64_t first_pairs,
                 const bf16* second, int64_t second_stride, int64_t num_second) {
        const int64_t block_rows = brgemm_ != nullptr ? 1 : BLOCK;
        for (int64_t row = 0; row < num_rows_; row += block_rows) {
            const int64_t count = std::min(block_rows, num_rows_ - row);
            const int64_t height = brgemm_ != nullptr ? 1 : height_of(count);
            Word* block = queries_ + (head * padded_ + row) * words_of(num_pairs_);
            const auto pack = [&](Word* to, const bf16* part, int64_t stride, int64_t num_columns) {
                pack_rows(
                    to, height, [&](int64_t r) { return part + (row + std::min(r, count - 1)) * stride; }, num_columns);
            };
            Word* end = block + words_of(first_pairs) * height;
            pack(block, first, first_stride, num_first);
            std::fill(block + words_of(pairs_of(num_first)) * height, end, Word(0));
            if (num_second) pack(end, second, second_stride, num_second);
        }
    }

    // All rows of one head meet a block of tokens that begins `first_seen` tokens after the first row's own: row r sees
    // r + 1 - first_seen of them, at most `num_keys`.
    void meet(int64_t head, const Panels& panels, int64_t first_seen, int64_t num_keys, float scale_log2) {
        const int64_t first = std::max<int64_t>(0, first_seen) / GROUP_ROWS * GROUP_ROWS;
        for (int64_t row = first; row < num_rows_; row += GROUP_ROWS) {
            group(head, row, panels, first_seen, num_keys, scale_log2);
        }
    }

    // Sums over all tokens, divided by the softmax's sum, rounded.
    void write(int64_t head, bf16* out, int64_t out_stride, int64_t num_columns) const {
        for (int64_t row = 0; row < num_rows_; ++row) {
            const float* from = sums_ + (head * padded_ + row) * width_;
            const F32x16 share = set(1.0f / softmax_[head * padded_ + row].sum);
            for (int64_t c = 0; c < num_columns; c += 16) {
                store(out + row * out_stride + c, load(from + c) * share, first_lanes(num_columns - c));
            }
        }
    }

 private:
    static int64_t height_of(int64_t rows) { return (rows + BLOCK / 3 - 1) / (BLOCK / 3) * (BLOCK / 3); }

    void group(int64_t head, int64_t row, const Panels& panels, int64_t first_seen, int64_t num_keys, float scale) {
        const int64_t rows = std::min(GROUP_ROWS, num_rows_ - row), base = head * padded_ + row;
        const auto seen_by = [&](int64_t r) { return std::min(num_keys, row + r + 1 - first_seen); };
        const int64_t seen = seen_by(rows - 1);
        if (brgemm_ != nullptr) {
            group_scores(base, rows, panels, seen);
        } else {
            for_blocks(rows, [&]<int ROWS>(int64_t r, int64_t last) {
                for (int64_t key = 0; key < seen_by(last); key += PANEL) {
                    score<ROWS>(scores_ + r * KEYS + key, queries_ + (base + r) * words_of(num_pairs_), panels,
                                key / PANEL);
                }
            });
        }
        float shrink[GROUP_ROWS];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t last = std::min(rows, r / BLOCK * BLOCK + BLOCK) - 1;
            const int64_t padded =
                brgemm_ != nullptr ? panels_of(seen) * PANEL : (std::max<int64_t>(0, seen_by(last)) + 15) / 16 * 16;
            shrink[r] = take_scores(softmax_[base + r], scores_ + r * KEYS, seen_by(r), padded, scale, p_ + r * KEYS);
        }
        if (brgemm_ != nullptr) return group_sums(base, rows, panels, seen, shrink);
        for (int64_t panel = 0; panel < panels.value_panels; ++panel) {
            for_blocks(rows, [&]<int ROWS>(int64_t r, int64_t last) {
                const int64_t pairs = (seen_by(last) + 1) / 2;
                if (pairs <= 0) return;
                sum<ROWS>(sums_ + (base + r) * width_ + panel * PANEL, shrink + r,
                          reinterpret_cast<const Word*>(p_ + r * KEYS), panels.values + panel * KEYS / 2 * PANEL,
                          pairs);
            });
        }
    }

    // Calls `block.operator()<height>(first row, last row)` for each block of `rows` rows.
    template <typename Function>
    static void for_blocks(int64_t rows, Function block) {
        for (int64_t r = 0; r < rows; r += BLOCK) {
            const int64_t count = std::min(BLOCK, rows - r);
            switch (height_of(count)) {
                case BLOCK / 3:
                    block.template operator()<BLOCK / 3>(r, r + count - 1);
                    break;
                case BLOCK / 3 * 2:
                    block.template operator()<BLOCK / 3 * 2>(r, r + count - 1);
                    break;
                default:
                    block.template operator()<BLOCK>(r, r + count - 1);
            }
        }
    }

    // Whole blocks of rows, so that few shapes are asked for; what comes of missing rows is not looked at.
    static int64_t whole_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

    void group_scores(int64_t base, int64_t rows, const Panels& panels, int64_t seen) const {
        const bf16* q = reinterpret_cast<const bf16*>(queries_ + base * words_of(num_pairs_));
        const auto add = [&](const bf16* first, const uint32_t* panel, int64_t pairs, int64_t key, bool more) {
            brgemm_->product(whole_blocks(rows), PANEL, 2 * pairs, 2 * num_pairs_, PANEL, KEYS, more, first,
                             reinterpret_cast<const bf16*>(panel), scores_ + key, true);
        };
        for (int64_t key = 0; key < seen; key += PANEL) {
            const int64_t i = key / PANEL * PANEL;
            add(q, panels.keys + i * panels.key_pairs, panels.key_pairs, key, false);
            if (panels.shared_pairs) {
                add(q + 2 * panels.key_pairs, panels.shared_keys + i * panels.shared_pairs, panels.shared_pairs, key,
                    true);
            }
        }
    }

    void group_sums(int64_t base, int64_t rows, const Panels& panels, int64_t seen, const float* shrink) const {
        float* sums = sums_ + base * width_;
        for (int64_t r = 0; r < rows; ++r) {
            const F32x16 kept = set(shrink[r]);
            for (int64_t c = r * width_; c < (r + 1) * width_; c += 16) {
                store(sums + c, load(sums + c) * kept);
            }
        }
        for (int64_t panel = 0; panel < panels.value_panels; ++panel) {
            brgemm_->product(whole_blocks(rows), PANEL, panels_of(seen) * PANEL, KEYS, PANEL, width_, true,
                             reinterpret_cast<const bf16*>(p_),
                             reinterpret_cast<const bf16*>(panels.values + panel * KEYS / 2 * PANEL),
                             sums + panel * PANEL, true);
        }
    }

    template <int ROWS>
    static void score(float* to, const Word* q, const Panels& panels, int64_t panel) {
        for_vectors<ROWS>([&]<int VECTORS>(int first) [[gnu::always_inline]] {
            F32x16 sums[ROWS][VECTORS];
            clear(sums);
            add_words<1, ROWS>(sums, q, panels.keys + panel * panels.key_pairs * PANEL, first, panels.key_pairs);
            if (panels.shared_pairs) {
                add_words<1, ROWS>(sums, q + words_of(panels.key_pairs) * ROWS,
                                   panels.shared_keys + panel * panels.shared_pairs * PANEL, first,
                                   panels.shared_pairs);
            }
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) store(to + r * KEYS + 16 * (first + v), sums[r][v]);
            }
        });
    }

    template <int ROWS>
    void sum(float* to, const float* shrink, const Word* p, const uint32_t* values, int64_t pairs) const {
        for_vectors<ROWS>([&]<int VECTORS>(int first) [[gnu::always_inline]] {
            F32x16 sums[ROWS][VECTORS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const F32x16 kept = set(shrink[r]);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(to + r * width_ + 16 * (first + v)) * kept;
            }
            add_words<words_of(KEYS / 2), 1>(sums, p, values, first, pairs);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) store(to + r * width_ + 16 * (first + v), sums[r][v]);
            }
        });
    }

    const Brgemm* brgemm_ = nullptr;
    int64_t num_rows_ = 0, padded_ = 0, num_pairs_ = 0, width_ = 0;
    Word* queries_ = nullptr;
    float *sums_ = nullptr, *scores_ = nullptr;
    Softmax* softmax_ = nullptr;
    Probability* p_ = nullptr;
    Scratch q_, o_, m_, s_, p_memory_;
};

// `num_rows` rows in order, a multiple of 32, times a panel by `brgemm`: the same pairs, as one run of 16 rows for
// each 32.
void rows_times_panel(uint32_t* pairs, int64_t pairs_stride, const uint32_t* rows, int64_t num_rows,
                      const uint32_t* panel, int64_t num_pairs, const Brgemm& brgemm) {
    static thread_local Scratch memory;
    float* sums = memory.of<float>(num_rows * PANEL);
    brgemm.product(num_rows, PANEL, 2 * num_pairs, 2 * num_pairs, PANEL, PANEL, false,
                   reinterpret_cast<const bf16*>(rows), reinterpret_cast<const bf16*>(panel), sums, true);
    for (int64_t r = 0; r < num_rows; r += 2) {
        uint32_t* to = pairs + r / PANEL * pairs_stride + r % PANEL / 2 * PANEL;
        const float* from = sums + r * PANEL;
        store_paired(to, load(from), load(from + PANEL));
        store_paired(to + 16, load(from + 16), load(from + PANEL + 16));
    }
}

// The rows that panels hold, in order: [32 panels][num_pairs].
void unpack(uint32_t* rows, const uint32_t* panels, int64_t num_panels, int64_t num_pairs) {
    for (int64_t row = 0; row < num_panels * PANEL; ++row) {
        const uint32_t* from = panels + row / PANEL * num_pairs * PANEL + row % PANEL;
        for (int64_t p = 0; p < num_pairs; ++p) rows[row * num_pairs + p] = from[p * PANEL];
    }
}

}  // namespace

// Latent attention of `num_rows` rows, the last of a context of `context_len` tokens in `slots`: per head
// softmax(scale (q_nope k^T + q_pe k_pe^T)) v with keys and values expanded from the latents by `w_uk` and `w_uv`
// (panels of 32 outputs, `rank` inputs, one head after the other). Strides count numbers.
void mla_prefill(bf16* out, int64_t out_row, const bf16* q_nope, int64_t nope_row, int64_t nope_head, const bf16* q_pe,
                 int64_t pe_row, int64_t pe_head, const bf16* cache, int64_t slot_stride, const int64_t* slots,
                 int64_t context_len, int64_t num_rows, const uint32_t* w_uk, const uint32_t* w_uv, int64_t num_heads,
                 int64_t key_dim, int64_t rope_dim, int64_t rank, int64_t value_dim, float scale, int num_threads,
                 const Brgemm* brgemm) {
    if (!TAKES_BRGEMM) brgemm = nullptr;
    static thread_local Scratch latent_memory, rope_memory, order_memory;
    const int64_t num_panels = panels_of(context_len), rank_pairs = pairs_of(rank), rope_pairs = pairs_of(rope_dim);
    const int64_t key_panels = panels_of(key_dim), value_panels = panels_of(value_dim);
    uint32_t* latents = latent_memory.of<uint32_t>(num_panels * rank_pairs * PANEL);
    // The latents as rows, which `brgemm` multiplies with w_uv.
    uint32_t* in_order = brgemm == nullptr ? nullptr : order_memory.of<uint32_t>(num_panels * PANEL * rank_pairs);
    uint32_t* ropes = rope_memory.of<uint32_t>(num_panels * rope_pairs * PANEL);
    const auto pack = [&](int64_t panel) {
        const bf16* token[PANEL];
        addresses(token, cache, slot_stride, slots, panel * PANEL, PANEL, context_len);
        pack_keys(latents + panel * rank_pairs * PANEL, token, rank);
        if (brgemm != nullptr) {
            unpack(in_order + panel * PANEL * rank_pairs, latents + panel * rank_pairs * PANEL, 1, rank_pairs);
        }
        for (auto& t : token) t += rank;
        pack_keys(ropes + panel * rope_pairs * PANEL, token, rope_dim);
    };
    const auto head_of = [&](int64_t head) {
        static thread_local Scratch key_memory, value_memory, weight_memory;
        static thread_local Rows rows;
        // Keys are multiplied out in whole panels of columns: those beyond `key_dim` are zeros that meet zeros.
        const int64_t key_pairs = key_panels * PANEL / 2;
        uint32_t* keys = key_memory.of<uint32_t>(KEYS * key_pairs);
        uint32_t* values = value_memory.of<uint32_t>(KEYS / 2 * value_panels * PANEL);
        rows.begin(1, num_rows, key_pairs + rope_pairs, value_panels, brgemm);
        rows.queries(0, q_nope + head * nope_head, nope_row, key_dim, key_pairs, q_pe + head * pe_head, pe_row,
                     rope_dim);
        const uint32_t* head_uk = w_uk + head * key_panels * rank_pairs * PANEL;
        const uint32_t* head_uv = w_uv + head * value_panels * rank_pairs * PANEL;
        uint32_t* uk_rows = nullptr;
        if (brgemm != nullptr) {
            uk_rows = weight_memory.of<uint32_t>(key_panels * PANEL * rank_pairs);
            unpack(uk_rows, head_uk, key_panels, rank_pairs);
        }
        const auto expand = [&](const uint32_t* block, const uint32_t* block_rows, int64_t blocks) {
            if (brgemm != nullptr) {
                for (int64_t t = 0; t < blocks; ++t) {
                    rows_times_panel(keys + t * key_pairs * PANEL, PANEL / 2 * PANEL, uk_rows, key_panels * PANEL,
                                     block + t * rank_pairs * PANEL, rank_pairs, *brgemm);
                }
                for (int64_t v = 0; v < value_panels; ++v) {
                    rows_times_panel(values + v * KEYS / 2 * PANEL, PANEL / 2 * PANEL, block_rows, blocks * PANEL,
                                     head_uv + v * rank_pairs * PANEL, rank_pairs, *brgemm);
                }
                return;
            }
            for (int64_t d = 0; d < key_panels; ++d) {
                const Word* rows_d = as_rows(head_uk + d * rank_pairs * PANEL, rank_pairs);
                for (int64_t t = 0; t < blocks; ++t) {
                    panel_times_panel(keys + (t * key_pairs + d * PANEL / 2) * PANEL, rows_d,
                                      block + t * rank_pairs * PANEL, rank_pairs);
                }
            }
            for (int64_t t = 0; t < blocks; ++t) {
                const Word* rows_t = as_rows(block + t * rank_pairs * PANEL, rank_pairs);
                for (int64_t v = 0; v < value_panels; ++v) {
                    panel_times_panel(values + (v * KEYS / 2 + t * PANEL / 2) * PANEL, rows_t,
                                      head_uv + v * rank_pairs * PANEL, rank_pairs);
                }
            }
        };
        for (int64_t key = 0; key < context_len; key += KEYS) {
            const int64_t num_keys = std::min(KEYS, context_len - key);
            expand(latents + key * rank_pairs, brgemm == nullptr ? nullptr : in_order + key * rank_pairs,
                   panels_of(num_keys));
            const Panels panels{keys, ropes + key * rope_pairs, values, key_pairs, rope_pairs, value_panels};
            rows.meet(0, panels, key - (context_len - num_rows), num_keys, scale * LOG2E);
        }
        rows.write(0, out + head * value_dim, out_row, value_dim);
        if (brgemm != nullptr) brgemm->release(true);
    };
    if (num_threads <= 1) {
        for (int64_t panel = 0; panel < num_panels; ++panel) pack(panel);
        for (int64_t head = 0; head < num_heads; ++head) head_of(head);
        return;
    }
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < num_panels; ++panel) pack(panel);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < num_heads; ++head) head_of(head);
    }
}

// Attention of `num_rows` rows, the last of a context of `context_len` tokens in `slots`, over keys and values in their
// caches: query head n reads key/value head kv_of[n]. Heads that read the same one stand side by side in `kv_of`.
void gqa_prefill(bf16* out, int64_t out_row, int64_t out_head, const bf16* q, int64_t q_row, int64_t q_head,
                 const bf16* key_cache, int64_t key_slot, int64_t key_head, const bf16* value_cache, int64_t value_slot,
                 int64_t value_head, const int64_t* slots, int64_t context_len, int64_t num_rows, const int32_t* kv_of,
                 int64_t num_heads, int64_t key_dim, int64_t value_dim, float scale, int num_threads,
                 const Brgemm* brgemm) {
    if (!TAKES_BRGEMM) brgemm = nullptr;
    const int64_t key_pairs = pairs_of(key_dim), value_panels = panels_of(value_dim);
    // Heads [first, stop) that read one key/value head.
    const auto heads_of = [&](int64_t first, int64_t stop) {
        static thread_local Scratch key_memory, value_memory;
        static thread_local Rows rows;
        uint32_t* keys = key_memory.of<uint32_t>(KEYS * key_pairs);
        uint32_t* values = value_memory.of<uint32_t>(KEYS / 2 * value_panels * PANEL);
        rows.begin(stop - first, num_rows, key_pairs, value_panels, brgemm);
        for (int64_t head = first; head < stop; ++head) {
            rows.queries(head - first, q + head * q_head, q_row, key_dim, key_pairs, nullptr, 0, 0);
        }
        const bf16* kv_keys = key_cache + kv_of[first] * key_head;
        const bf16* kv_values = value_cache + kv_of[first] * value_head;
        for (int64_t key = 0; key < context_len; key += KEYS) {
            const int64_t num_keys = std::min(KEYS, context_len - key), padded = panels_of(num_keys) * PANEL;
            const bf16* token[KEYS];
            addresses(token, kv_keys, key_slot, slots, key, padded, context_len);
            for (int64_t t = 0; t < padded; t += PANEL) pack_keys(keys + t * key_pairs, token + t, key_dim);
            addresses(token, kv_values, value_slot, slots, key, padded, context_len);
            for (int64_t v = 0; v < value_panels; ++v) {
                pack_values(values + v * KEYS / 2 * PANEL, token, padded, v * PANEL, value_dim - v * PANEL);
            }
            const Panels panels{keys, nullptr, values, key_pairs, 0, value_panels};
            for (int64_t head = 0; head < stop - first; ++head) {
                rows.meet(head, panels, key - (context_len - num_rows), num_keys, scale * LOG2E);
            }
        }
        for (int64_t head = first; head < stop; ++head) {
            rows.write(head - first, out + head * out_head, out_row, value_dim);
        }
        if (brgemm != nullptr) brgemm->release(true);
    };
    const int64_t of_threads = (num_heads + num_threads - 1) / std::max(1, num_threads);
    const int64_t of_memory = SUMS / (num_rows * value_panels * PANEL);
    const int64_t at_once = std::max<int64_t>(1, std::min(of_threads, of_memory));
    const auto task_end = [&](int64_t first) {
        int64_t stop = first + 1;
        while (stop < num_heads && stop - first < at_once && kv_of[stop] == kv_of[first]) ++stop;
        return stop;
    };
    if (num_threads <= 1) {
        for (int64_t head = 0; head < num_heads; head = task_end(head)) heads_of(head, task_end(head));
        return;
    }
#pragma omp parallel num_threads(num_threads)
#pragma omp single
    for (int64_t head = 0; head < num_heads; head = task_end(head)) {
        const int64_t stop = task_end(head);
#pragma omp task firstprivate(head, stop)
        heads_of(head, stop);
    }
}

}  // namespace narrows::NARROWS_TARGET
