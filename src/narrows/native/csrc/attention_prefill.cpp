// Causal attention of the last rows of one context over all of it, in blocks: neither all scores nor, for latent
// attention, all expanded keys and values are ever in memory.
//
// For each head, and for each block of KEYS tokens: its panels of keys and values are made (packed from the cache, or
// multiplied from the latents), then every group of rows that sees some of the block meets it.
//
// On CPUs with AMX the products are another library's (`Brgemm`), of the same panels with rows in order.
#include "attention_pack.h"

#include <omp.h>

#include "export.h"
#include "tape.h"

#ifdef NARROWS_GEMM
using namespace narrows;

namespace {

constexpr int64_t KEYS = 256;           // tokens of a block: its values' panel stays in the L1 cache
constexpr int64_t KEY_PANELS = KEYS / PANEL;
constexpr int64_t SUMS = 4 << 20;       // most sums in float32 kept at once, for heads that share their keys
constexpr int64_t GROUP = 4;            // blocks of rows that meet a panel of keys while it is in the L1 cache
constexpr int64_t GROUP_ROWS = GROUP * BLOCK;

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
        queries_ = q_.of<uint32_t>(num_heads * padded * num_pairs);
        sums_ = o_.of<float>(num_heads * padded * width_);
        std::fill(sums_, sums_ + num_heads * padded * width_, 0.0f);
        softmax_ = m_.of<Softmax>(num_heads * padded);
        std::fill(softmax_, softmax_ + num_heads * padded, Softmax{});
        scores_ = s_.of<float>(GROUP_ROWS * KEYS);
        p_ = p_memory_.of<bf16>(GROUP_ROWS * KEYS);
        padded_ = padded;
    }

    // Queries of one head: two parts side by side, the first in `first_pairs` pairs.
    void queries(int64_t head, const bf16* first, int64_t first_stride, int64_t num_first, int64_t first_pairs,
                 const bf16* second, int64_t second_stride, int64_t num_second) {
        const int64_t block_rows = brgemm_ != nullptr ? 1 : BLOCK;
        for (int64_t row = 0; row < num_rows_; row += block_rows) {
            const int64_t count = std::min(block_rows, num_rows_ - row);
            const int64_t height = brgemm_ != nullptr ? 1 : height_of(count);
            uint32_t* block = queries_ + (head * padded_ + row) * num_pairs_;
            for (int64_t r = 0; r < height; ++r) {
                const int64_t from = row + std::min(r, count - 1);
                part(block + r, height, first + from * first_stride, num_first);
                for (int64_t p = pairs_of(num_first); p < first_pairs; ++p) block[p * height + r] = 0;
                if (num_second) part(block + first_pairs * height + r, height, second + from * second_stride, num_second);
            }
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
            const __m512 share = _mm512_set1_ps(1.0f / softmax_[head * padded_ + row].sum);
            for (int64_t c = 0; c < num_columns; c += 16) {
                store16(out + row * out_stride + c, _mm512_mul_ps(_mm512_loadu_ps(from + c), share),
                        first_lanes(num_columns - c));
            }
        }
    }

   private:
    static int64_t height_of(int64_t rows) { return (rows + 3) / 4 * 4; }

    static void part(uint32_t* to, int64_t height, const bf16* row, int64_t num_columns) {
        for (int64_t p = 0; p < num_columns / 2; ++p) std::memcpy(to + p * height, row + 2 * p, 4);
        if (num_columns % 2) to[num_columns / 2 * height] = row[num_columns - 1];
    }

    void group(int64_t head, int64_t row, const Panels& panels, int64_t first_seen, int64_t num_keys, float scale) {
        const int64_t rows = std::min(GROUP_ROWS, num_rows_ - row), base = head * padded_ + row;
        const auto seen_by = [&](int64_t r) { return std::min(num_keys, row + r + 1 - first_seen); };
        const int64_t seen = seen_by(rows - 1);
        if (brgemm_ != nullptr) {
            group_scores(base, rows, panels, seen);
        } else {
            for_blocks(rows, [&]<int ROWS>(int64_t r, int64_t last) {
                for (int64_t key = 0; key < seen_by(last); key += PANEL) {
                    score<ROWS>(scores_ + r * KEYS + key, queries_ + (base + r) * num_pairs_, panels, key / PANEL);
                }
            });
        }
        float shrink[GROUP_ROWS];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t last = std::min(rows, r / BLOCK * BLOCK + BLOCK) - 1;
            const int64_t padded = brgemm_ != nullptr ? panels_of(seen) * PANEL
                                                      : (std::max<int64_t>(0, seen_by(last)) + 15) / 16 * 16;
            shrink[r] = take_scores(softmax_[base + r], scores_ + r * KEYS, seen_by(r), padded, scale, p_ + r * KEYS);
        }
        if (brgemm_ != nullptr) return group_sums(base, rows, panels, seen, shrink);
        for (int64_t panel = 0; panel < panels.value_panels; ++panel) {
            for_blocks(rows, [&]<int ROWS>(int64_t r, int64_t last) {
                const int64_t pairs = (seen_by(last) + 1) / 2;
                if (pairs <= 0) return;
                sum<ROWS>(sums_ + (base + r) * width_ + panel * PANEL, shrink + r,
                          reinterpret_cast<const uint32_t*>(p_ + r * KEYS), panels.values + panel * KEYS / 2 * PANEL, pairs);
            });
        }
    }

    // Calls `block.operator()<height>(first row, last row)` for each block of `rows` rows.
    template <typename Function>
    static void for_blocks(int64_t rows, Function block) {
        for (int64_t r = 0; r < rows; r += BLOCK) {
            const int64_t count = std::min(BLOCK, rows - r);
            switch (height_of(count)) {
                case 4: block.template operator()<4>(r, r + count - 1); break;
                case 8: block.template operator()<8>(r, r + count - 1); break;
                default: block.template operator()<12>(r, r + count - 1);
            }
        }
    }

    // Whole blocks of rows, so that few shapes are asked for; what comes of missing rows is not looked at.
    static int64_t whole_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK * BLOCK; }

    void group_scores(int64_t base, int64_t rows, const Panels& panels, int64_t seen) const {
        const bf16* q = reinterpret_cast<const bf16*>(queries_ + base * num_pairs_);
        const auto add = [&](const bf16* first, const uint32_t* panel, int64_t pairs, int64_t key, bool more) {
            brgemm_->product(whole_blocks(rows), PANEL, 2 * pairs, 2 * num_pairs_, PANEL, KEYS, more, first,
                             reinterpret_cast<const bf16*>(panel), scores_ + key, true);
        };
        for (int64_t key = 0; key < seen; key += PANEL) {
            const int64_t i = key / PANEL * PANEL;
            add(q, panels.keys + i * panels.key_pairs, panels.key_pairs, key, false);
            if (panels.shared_pairs) {
                add(q + 2 * panels.key_pairs, panels.shared_keys + i * panels.shared_pairs, panels.shared_pairs, key, true);
            }
        }
    }

    void group_sums(int64_t base, int64_t rows, const Panels& panels, int64_t seen, const float* shrink) const {
        float* sums = sums_ + base * width_;
        for (int64_t r = 0; r < rows; ++r) {
            const __m512 kept = _mm512_set1_ps(shrink[r]);
            for (int64_t c = r * width_; c < (r + 1) * width_; c += 16) {
                _mm512_storeu_ps(sums + c, _mm512_mul_ps(_mm512_loadu_ps(sums + c), kept));
            }
        }
        for (int64_t panel = 0; panel < panels.value_panels; ++panel) {
            brgemm_->product(whole_blocks(rows), PANEL, panels_of(seen) * PANEL, KEYS, PANEL, width_, true, p_,
                             reinterpret_cast<const bf16*>(panels.values + panel * KEYS / 2 * PANEL),
                             sums + panel * PANEL, true);
        }
    }

    template <int ROWS>
    static void score(float* to, const uint32_t* q, const Panels& panels, int64_t panel) {
        __m512 low[ROWS], high[ROWS];
        clear<ROWS>(low, high);
        add_products<ROWS, 1, ROWS>(low, high, q, panels.keys + panel * panels.key_pairs * PANEL, panels.key_pairs);
        if (panels.shared_pairs) {
            add_products<ROWS, 1, ROWS>(low, high, q + panels.key_pairs * ROWS,
                                        panels.shared_keys + panel * panels.shared_pairs * PANEL, panels.shared_pairs);
        }
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            _mm512_storeu_ps(to + r * KEYS, low[r]);
            _mm512_storeu_ps(to + r * KEYS + 16, high[r]);
        }
    }

    template <int ROWS>
    void sum(float* to, const float* shrink, const uint32_t* p, const uint32_t* values, int64_t pairs) const {
        __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512 kept = _mm512_set1_ps(shrink[r]);
            low[r] = _mm512_mul_ps(_mm512_loadu_ps(to + r * width_), kept);
            high[r] = _mm512_mul_ps(_mm512_loadu_ps(to + r * width_ + 16), kept);
        }
        add_products<ROWS, KEYS / 2, 1>(low, high, p, values, pairs);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            _mm512_storeu_ps(to + r * width_, low[r]);
            _mm512_storeu_ps(to + r * width_ + 16, high[r]);
        }
    }

    const Brgemm* brgemm_ = nullptr;
    int64_t num_rows_ = 0, padded_ = 0, num_pairs_ = 0, width_ = 0;
    uint32_t* queries_ = nullptr;
    float *sums_ = nullptr, *scores_ = nullptr;
    Softmax* softmax_ = nullptr;
    bf16* p_ = nullptr;
    Scratch q_, o_, m_, s_, p_memory_;
};

// Rows [0, 32) of one panel, as the broadcast operand, times another panel: 32 rows of 32 results, stored as 16 rows of
// pairs of rows.
void panel_times_panel(uint32_t* pairs, const uint32_t* rows, const uint32_t* panel, int64_t num_pairs) {
    const auto part = [&]<int ROWS>(int64_t first) [[gnu::always_inline]] {
        __m512 low[ROWS], high[ROWS];
        clear<ROWS>(low, high);
        add_products<ROWS, 1, PANEL>(low, high, rows + first, panel, num_pairs);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r += 2) {
            uint32_t* to = pairs + (first + r) / 2 * PANEL;
            _mm512_storeu_si512(to, paired(low[r], low[r + 1]));
            _mm512_storeu_si512(to + 16, paired(high[r], high[r + 1]));
        }
    };
    part.template operator()<12>(0);
    part.template operator()<10>(12);
    part.template operator()<10>(22);
}

// `num_rows` rows in order, a multiple of 32, times a panel by `brgemm`: the same pairs, as one run of 16 rows for each 32.
void rows_times_panel(uint32_t* pairs, int64_t pairs_stride, const uint32_t* rows, int64_t num_rows,
                      const uint32_t* panel, int64_t num_pairs, const Brgemm& brgemm) {
    static thread_local Scratch memory;
    float* sums = memory.of<float>(num_rows * PANEL);
    brgemm.product(num_rows, PANEL, 2 * num_pairs, 2 * num_pairs, PANEL, PANEL, false,
                   reinterpret_cast<const bf16*>(rows), reinterpret_cast<const bf16*>(panel), sums, true);
    for (int64_t r = 0; r < num_rows; r += 2) {
        uint32_t* to = pairs + r / PANEL * pairs_stride + r % PANEL / 2 * PANEL;
        const float* from = sums + r * PANEL;
        _mm512_storeu_si512(to, paired(_mm512_loadu_ps(from), _mm512_loadu_ps(from + PANEL)));
        _mm512_storeu_si512(to + 16, paired(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from + PANEL + 16)));
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
NARROWS_EXPORT void narrows_mla_prefill(bf16* out, int64_t out_row, const bf16* q_nope, int64_t nope_row,
                                        int64_t nope_head, const bf16* q_pe, int64_t pe_row, int64_t pe_head,
                                        const bf16* cache, int64_t slot_stride, const int64_t* slots,
                                        int64_t context_len, int64_t num_rows, const uint32_t* w_uk,
                                        const uint32_t* w_uv, int64_t num_heads, int64_t key_dim, int64_t rope_dim,
                                        int64_t rank, int64_t value_dim, float scale, int num_threads,
                                        const Brgemm* brgemm) {
    NARROWS_NOT_TAPED
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
        rows.queries(0, q_nope + head * nope_head, nope_row, key_dim, key_pairs, q_pe + head * pe_head, pe_row, rope_dim);
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
                for (int64_t t = 0; t < blocks; ++t) {
                    panel_times_panel(keys + (t * key_pairs + d * PANEL / 2) * PANEL, head_uk + d * rank_pairs * PANEL,
                                      block + t * rank_pairs * PANEL, rank_pairs);
                }
            }
            for (int64_t v = 0; v < value_panels; ++v) {
                for (int64_t t = 0; t < blocks; ++t) {
                    panel_times_panel(values + (v * KEYS / 2 + t * PANEL / 2) * PANEL, block + t * rank_pairs * PANEL,
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
NARROWS_EXPORT void narrows_gqa_prefill(bf16* out, int64_t out_row, int64_t out_head, const bf16* q, int64_t q_row,
                                        int64_t q_head, const bf16* key_cache, int64_t key_slot, int64_t key_head,
                                        const bf16* value_cache, int64_t value_slot, int64_t value_head,
                                        const int64_t* slots, int64_t context_len, int64_t num_rows,
                                        const int32_t* kv_of, int64_t num_heads, int64_t key_dim, int64_t value_dim,
                                        float scale, int num_threads, const Brgemm* brgemm) {
    NARROWS_NOT_TAPED
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
#endif
