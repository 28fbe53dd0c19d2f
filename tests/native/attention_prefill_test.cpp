// Causal attention of the last rows of a context against loops over single numbers.
#include "attention_lab.h"

using namespace testing;

TEST_AT_EDGES(latent_prefill_rows) {
    const int64_t shapes[][5] = {{1, 5, 2, 7, 3}, {2, 24, 8, 40, 33}, {3, 33, 3, 31, 20}};
    const std::pair<int64_t, int64_t> spans[] = {{1, 1}, {1, 40}, {13, 13}, {50, 300}};  // rows, context
    for (const auto& [heads, key_dim, rope_dim, rank, value_dim] : shapes) {
        for (const auto& [num_rows, len] : spans) {
            for (const Brgemm* brgemm : {static_cast<const Brgemm*>(nullptr), &plain_brgemm}) {
                if (brgemm && len == 300 && (heads > 2 || edge != Edge::heap)) continue;  // slow, and nothing new
                Latent of(num_rows, heads, key_dim, rope_dim, rank, value_dim, 31);
                Buffer<int64_t> slots(len);
                mix_slots(slots, of.num_slots);
                const int64_t out_row = heads * value_dim + 1;
                Buffer<bf16> out(span(num_rows, out_row, heads * value_dim));
                const auto run = [&, heads = heads, key_dim = key_dim, rope_dim = rope_dim, rank = rank,
                                  value_dim = value_dim, num_rows = num_rows, len = len] {
                    call::mla_prefill(out.data(), out_row, of.q_nope.data(), of.q_row, key_dim, of.q_pe.data(),
                                      of.pe_row, rope_dim, of.cache.data(), of.slot, slots.data(), len, num_rows,
                                      of.w_uk.panels(), of.w_uv.panels(), heads, key_dim, rope_dim, rank, value_dim,
                                      0.3f, num_rows == 13 ? 2 : 1, brgemm);
                };
                run();
                for (int64_t t = 0; t < num_rows; t += num_rows > 20 ? 7 : 1)
                    for (int64_t n = 0; n < heads; ++n)
                        check_row(&out[t * out_row + n * value_dim],
                                  of.row(t, n, slots.data(), len - num_rows + t + 1, 0.3), t, n, len);
                check_not_replayed(run);
            }
        }
    }
}

TEST_AT_EDGES(grouped_prefill_rows) {
    const std::vector<std::vector<int32_t>> groups = {{0}, {0, 0, 1}, {1, 1, 2, 2, 2}};
    const std::pair<int64_t, int64_t> spans[] = {{1, 1}, {3, 40}, {13, 13}, {50, 300}};
    for (const auto& kv_of : groups) {
        for (const auto& [key_dim, value_dim] : {std::pair{6, 5}, {33, 40}, {64, 32}}) {
            for (const auto& [num_rows, len] : spans) {
                for (const Brgemm* brgemm : {static_cast<const Brgemm*>(nullptr), &plain_brgemm}) {
                    // slow, and nothing new
                    if (brgemm && len == 300 && (kv_of.size() > 1 || edge != Edge::heap)) continue;
                    Grouped of(num_rows, kv_of, 3, key_dim, value_dim, 50);
                    Buffer<int64_t> slots(len);
                    mix_slots(slots, of.num_slots);
                    const int64_t out_head = value_dim + 1, out_row = of.num_heads * out_head;
                    Buffer<bf16> out(num_rows * out_row);
                    const auto run = [&, key_dim = key_dim, value_dim = value_dim, num_rows = num_rows, len = len] {
                        call::gqa_prefill(out.data(), out_row, out_head, of.q.data(), of.q_row, key_dim, of.keys.data(),
                                          of.key_slot, key_dim, of.values.data(), of.value_slot, value_dim,
                                          slots.data(), len, num_rows, of.kv_of.data(), of.num_heads, key_dim,
                                          value_dim, 0.5f, num_rows == 13 ? 2 : 1, brgemm);
                    };
                    run();
                    for (int64_t t = 0; t < num_rows; t += num_rows > 20 ? 7 : 1)
                        for (int64_t n = 0; n < of.num_heads; ++n)
                            check_row(&out[t * out_row + n * out_head],
                                      of.row(t, n, slots.data(), len - num_rows + t + 1, 0.5), t, n, len);
                    check_not_replayed(run);
                }
            }
        }
    }
}
