// Attention of single rows, and products per head, against loops over single numbers.
#include "attention_lab.h"

using namespace testing;

TEST_AT_EDGES(products_per_head) {
    Random random;
    for (const int64_t num_rows : {0, 1, 14}) {
        for (const auto& [outputs, inputs] : {std::pair{1, 1}, {33, 15}, {40, 64}}) {
            const int64_t heads = 3, x_head = inputs + 1, x_row = heads * x_head, threads = num_rows == 14 ? 2 : 1;
            testing::Weights weights(heads, outputs, inputs, BF16_WEIGHT, false, random);
            Buffer<bf16> x(num_rows ? num_rows * x_row - 1 : 0), out(num_rows * heads * outputs);
            fill_whole(x, random);
            const auto run = [&, outputs = outputs, inputs = inputs] {
                call::per_head(out.data(), heads * outputs, outputs, x.data(), x_row, x_head, weights.panels(),
                               num_rows, heads, inputs, outputs, int(threads));
            };
            run();
            for (int64_t t = 0; t < num_rows * heads; ++t) {
                for (int64_t o = 0; o < outputs; ++o) {
                    float sum = 0;
                    for (int64_t i = 0; i < inputs; ++i)
                        sum += to_float(x[t / heads * x_row + t % heads * x_head + i]) * weights.at(t % heads, o, i);
                    CHECK(out[t * outputs + o] == to_bf16(sum), num_rows, t, o);
                }
            }
            check_not_replayed(run);
        }
    }
}

TEST_AT_EDGES(latent_decode_rows) {
    const int64_t shapes[][5] = {{1, 5, 2, 7, 3}, {2, 24, 8, 40, 33}, {11, 16, 6, 33, 20}, {3, 32, 16, 64, 32}};
    for (const auto& [heads, key_dim, rope_dim, rank, value_dim] : shapes) {
        for (const bool scattered : {false, true}) {
            const int64_t lens[] = {1, 37, 130}, num_rows = 3, all_rows = scattered ? 5 : num_rows, most = 130;
            Latent of(all_rows, heads, key_dim, rope_dim, rank, value_dim, 31);
            Buffer<int64_t> slots(num_rows * most), held_lens(num_rows), row_of(scattered ? num_rows : 0);
            mix_slots(slots, of.num_slots);
            for (int64_t b = 0; b < num_rows; ++b) held_lens[b] = lens[b];
            for (int64_t b = 0; b < row_of.size(); ++b) row_of[b] = 4 - 2 * b;
            // w_uk as it multiplies queries: turned.
            Buffer<bf16> turned(rank * key_dim);
            const int64_t panel_words = panels_of(rank) * pairs_of(key_dim) * PANEL;
            Buffer<uint32_t> absorb(heads * panel_words);
            for (int64_t n = 0; n < heads; ++n) {
                for (int64_t i = 0; i < turned.size(); ++i)
                    turned[i] = stored<bf16>(of.w_uk.at(n, i % key_dim, i / key_dim));
                call::gemm_pack(&absorb[n * panel_words], turned.data(), key_dim, 0, rank, key_dim, -1);
            }
            Buffer<bf16> out(all_rows * heads * value_dim);
            const auto run = [&, heads = heads, key_dim = key_dim, rope_dim = rope_dim, rank = rank,
                              value_dim = value_dim] {
                call::mla_decode(out.data(), heads * value_dim, of.q_nope.data(), of.q_row, key_dim, of.q_pe.data(),
                                 of.pe_row, rope_dim, of.cache.data(), of.slot, slots.data(), most, held_lens.data(),
                                 row_of.data(), num_rows, absorb.data(), of.w_uv.panels(), heads, key_dim, rope_dim,
                                 rank, value_dim, 0.3f, scattered ? 3 : 1);
            };
            run();
            for (int64_t b = 0; b < num_rows; ++b) {
                const int64_t t = scattered ? row_of[b] : b;
                for (int64_t n = 0; n < heads; ++n)
                    check_row(&out[(t * heads + n) * value_dim], of.row(t, n, &slots[b * most], lens[b], 0.3), t, n,
                              lens[b]);
            }
            check_replay(out, run);
        }
    }
}

TEST_AT_EDGES(grouped_decode_rows) {
    const std::vector<std::vector<int32_t>> groups = {
        {0}, {0, 0, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {0, 1, 1, 2}, {}};
    for (const auto& kv_of : groups) {
        for (const auto& [key_dim, value_dim] : {std::pair{6, 5}, {32, 32}, {40, 70}}) {
            // A window is a row that reads fewer slots, from a place of its own on.
            const int64_t lens[] = {130, 1, 16, 33}, num_rows = 4, most = 131, window = 1;
            const int64_t threads = key_dim == 40 ? 3 : 1;
            Grouped of(num_rows, kv_of, 3, key_dim, value_dim, 50);
            Buffer<int64_t> slots(num_rows * most), held_lens(num_rows);
            mix_slots(slots, of.num_slots);
            for (int64_t b = 0; b < num_rows; ++b) held_lens[b] = lens[b];
            const int64_t out_head = value_dim + 1, out_row = of.num_heads * out_head;
            Buffer<bf16> out(num_rows * out_row);
            const auto run = [&, key_dim = key_dim, value_dim = value_dim] {
                call::gqa_decode(out.data(), out_row, out_head, of.q.data(), of.q_row, key_dim, of.keys.data(),
                                 of.key_slot, key_dim, of.values.data(), of.value_slot, value_dim,
                                 slots.data() + window, most, held_lens.data(), nullptr, num_rows, of.kv_of.data(),
                                 of.num_heads, key_dim, value_dim, 0.5f, int(threads));
            };
            run();
            for (int64_t b = 0; b < num_rows; ++b)
                for (int64_t n = 0; n < of.num_heads; ++n)
                    check_row(&out[b * out_row + n * out_head], of.row(b, n, &slots[b * most + window], lens[b], 0.5),
                              b, n, lens[b]);
            check_replay(out, run);
        }
    }
}

TEST(no_decode_rows_at_all) {
    Grouped of(1, {0, 1}, 2, 8, 8, 3);
    call::gqa_decode(nullptr, 16, 8, of.q.data(), of.q_row, 8, of.keys.data(), of.key_slot, 8, of.values.data(),
                     of.value_slot, 8, nullptr, 0, nullptr, nullptr, 0, of.kv_of.data(), 2, 8, 8, 1.0f, 1);
    Latent latent(1, 2, 8, 4, 8, 8, 3);
    call::mla_decode(nullptr, 16, latent.q_nope.data(), latent.q_row, 8, latent.q_pe.data(), latent.pe_row, 4,
                     latent.cache.data(), latent.slot, nullptr, 0, nullptr, nullptr, 0, latent.w_uk.panels(),
                     latent.w_uv.panels(), 2, 8, 4, 8, 8, 1.0f, 1);
}
