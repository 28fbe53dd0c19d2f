// What the tests of attention share: a paged cache, and attention of one row over single numbers.
#pragma once

#include "weights.h"

namespace testing {

// softmax(scale * q k^T) v over `len` tokens, for one query.
template <typename KeyAt, typename ValueAt>
std::vector<double> attention(const std::vector<double>& q, int64_t len, int64_t value_dim, double scale, KeyAt key,
                              ValueAt value) {
    std::vector<double> score(len), out(value_dim);
    double largest = -1e30, sum = 0;
    for (int64_t l = 0; l < len; ++l) {
        for (size_t d = 0; d < q.size(); ++d) score[l] += q[d] * key(l, int64_t(d));
        largest = std::max(largest, score[l] *= scale);
    }
    for (double& s : score) sum += s = std::exp(s - largest);
    for (int64_t l = 0; l < len; ++l)
        for (int64_t v = 0; v < value_dim; ++v) out[v] += score[l] / sum * value(l, v);
    return out;
}

// `num_slots` slots in an order of their own.
inline void mix_slots(Buffer<int64_t>& slots, int64_t num_slots) {
    for (int64_t i = 0; i < slots.size(); ++i) slots[i] = (i * 7 + 3) % num_slots;
}

// A latent cache [num_slots, slot], queries, and the two halves of kv_b_proj per head.
struct Latent {
    int64_t num_heads, key_dim, rope_dim, rank, value_dim;
    int64_t num_slots, slot, q_row, pe_row;
    Random random;
    Buffer<bf16> cache, q_nope, q_pe;
    Weights w_uk, w_uv;

    Latent(int64_t num_rows, int64_t heads, int64_t key, int64_t rope, int64_t latent, int64_t value, int64_t slots)
        : num_heads(heads),
          key_dim(key),
          rope_dim(rope),
          rank(latent),
          value_dim(value),
          num_slots(slots),
          slot(latent + rope + 1),
          q_row(heads * key + 3),
          pe_row(heads * rope + 1),
          random(uint64_t(num_rows + heads)),
          cache(span(slots, slot, latent + rope)),
          q_nope(heads ? span(num_rows, q_row, heads * key) : 0),
          q_pe(heads ? span(num_rows, pe_row, heads * rope) : 0),
          w_uk(heads, key, latent, BF16_WEIGHT, false, random, 0.0625f),
          w_uv(heads, value, latent, BF16_WEIGHT, false, random, 0.0625f) {
        fill_uniform(cache, random), fill_uniform(q_nope, random), fill_uniform(q_pe, random);
    }

    double latent(int64_t at, int64_t i) { return to_float(cache[at * slot + i]); }

    // One row and head over the tokens in `slots`.
    std::vector<double> row(int64_t t, int64_t n, const int64_t* slots, int64_t len, double scale) {
        std::vector<double> q(rank + rope_dim);
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t d = 0; d < key_dim; ++d)
                q[r] += to_float(q_nope[t * q_row + n * key_dim + d]) * w_uk.at(n, d, r);
        for (int64_t p = 0; p < rope_dim; ++p) q[rank + p] = to_float(q_pe[t * pe_row + n * rope_dim + p]);
        const auto key = [&](int64_t l, int64_t d) { return latent(slots[l], d); };
        const std::vector<double> c = attention(q, len, rank, scale, key, key);
        std::vector<double> out(value_dim);
        for (int64_t v = 0; v < value_dim; ++v)
            for (int64_t r = 0; r < rank; ++r) out[v] += c[r] * w_uv.at(n, v, r);
        return out;
    }
};

// Caches of keys and values [num_slots, heads, dim], with a gap behind each slot, and queries.
struct Grouped {
    int64_t num_heads, num_kv, key_dim, value_dim;
    int64_t num_slots, key_slot, value_slot, q_row;
    Random random;
    Buffer<bf16> keys, values, q;
    Buffer<int32_t> kv_of;

    Grouped(int64_t num_rows, const std::vector<int32_t>& kv, int64_t kv_heads, int64_t key, int64_t value,
            int64_t slots)
        : num_heads(int64_t(kv.size())),
          num_kv(kv_heads),
          key_dim(key),
          value_dim(value),
          num_slots(slots),
          key_slot(kv_heads * key + 2),
          value_slot(kv_heads * value + 1),
          q_row(num_heads * key + 1),
          random(uint64_t(num_rows + key)),
          keys(span(slots, key_slot, kv_heads * key)),
          values(span(slots, value_slot, kv_heads * value)),
          q(num_heads ? span(num_rows, q_row, num_heads * key) : 0),
          kv_of(num_heads) {
        for (int64_t n = 0; n < num_heads; ++n) kv_of[n] = kv[size_t(n)];
        fill_uniform(keys, random), fill_uniform(values, random), fill_uniform(q, random);
    }

    std::vector<double> row(int64_t t, int64_t n, const int64_t* slots, int64_t len, double scale) {
        std::vector<double> query(key_dim);
        for (int64_t d = 0; d < key_dim; ++d) query[d] = to_float(q[t * q_row + n * key_dim + d]);
        const int64_t kv = kv_of[n];
        return attention(
            query, len, value_dim, scale,
            [&](int64_t l, int64_t d) { return double(to_float(keys[slots[l] * key_slot + kv * key_dim + d])); },
            [&](int64_t l, int64_t v) { return double(to_float(values[slots[l] * value_slot + kv * value_dim + v])); });
    }
};

inline void check_row(const bf16* got, const std::vector<double>& want, int64_t t, int64_t n, int64_t len) {
    for (size_t v = 0; v < want.size(); ++v)
        CHECK(near(to_float(got[v]), want[v], 0.03), t, n, len, v, to_float(got[v]), want[v]);
}

}  // namespace testing
