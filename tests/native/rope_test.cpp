// Rotary embedding and the write of slots against loops over single pairs.
#include "check.h"

using namespace testing;

namespace {

// One head of x rotated, in halves.
template <typename T, typename Table>
void check_rotated(const T* got, const std::vector<double>& x, const Table* cos, const Table* sin, int64_t half,
                   bool interleaved) {
    const double tolerance = sizeof(T) == 4 ? 1e-5 : 0.02;
    for (int64_t i = 0; i < half; ++i) {
        const double a = x[interleaved ? 2 * i : i], b = x[interleaved ? 2 * i + 1 : half + i];
        CHECK(near(to_float(got[i]), a * to_float(cos[i]) - b * to_float(sin[i]), tolerance), half, i);
        CHECK(near(to_float(got[half + i]), b * to_float(cos[i]) + a * to_float(sin[i]), tolerance), half, i);
    }
}

template <typename T>
std::vector<double> numbers(const T* x, int64_t count) {
    std::vector<double> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(to_float(x[i]));
    return out;
}

template <typename T>
void restore(Buffer<T>& to, const std::string& bytes) {
    if (!bytes.empty()) std::memcpy(to.data(), bytes.data(), bytes.size());
}

template <typename T, typename Table>
void ropes() {
    constexpr int is_float = sizeof(T) == 4, table_is_float = sizeof(Table) == 4;
    Random random;
    for (const int64_t half : {1, 8, 15, 16, 17, 40}) {
        for (const int64_t num_rows : {0, 1, 5}) {
            const int64_t heads = 3, head = 2 * half + 1, row = heads * head + 2, threads = num_rows == 5 ? 2 : 1;
            Buffer<Table> cos(num_rows * half), sin(num_rows * half);
            fill_uniform(cos, random), fill_uniform(sin, random);
            Buffer<int64_t> slots(num_rows);
            for (int64_t t = 0; t < num_rows; ++t) slots[t] = (t * 3 + 1) % 7;

            Buffer<T> x(num_rows ? span(num_rows, row, (heads - 1) * head + 2 * half) : 0),
                out(num_rows * heads * 2 * half);
            fill_uniform(x, random);
            for (const bool interleaved : {false, true}) {
                const auto rotate = [&] {
                    call::rope_rows(out.data(), heads * 2 * half, 2 * half, x.data(), row, head, cos.data(), sin.data(),
                                    num_rows, heads, half, interleaved, is_float, table_is_float, int(threads));
                };
                rotate();
                for (int64_t t = 0; t < num_rows * heads; ++t) {
                    const int64_t r = t / heads;
                    check_rotated(&out[t * 2 * half], numbers(&x[r * row + t % heads * head], 2 * half), &cos[r * half],
                                  &sin[r * half], half, interleaved);
                }
                check_replay(out, rotate);
            }

            const int64_t rank = 5, slot = rank + 2 * half, latent_row = slot + 1;
            Buffer<T> latents(span(num_rows, latent_row, slot)), cache(7 * slot);
            fill_uniform(latents, random);
            const std::string before = x.bytes();
            const auto write = [&] {
                call::rope_latents(x.data(), row, head, latents.data(), latent_row, cos.data(), sin.data(),
                                   cache.data(), slot, slots.data(), num_rows, heads, rank, half, is_float,
                                   table_is_float, int(threads));
            };
            std::vector<double> plain = numbers(x.data(), x.size());
            write();
            for (int64_t t = 0; t < num_rows; ++t) {
                for (int64_t h = 0; h < heads; ++h) {
                    const double* from = plain.data() + t * row + h * head;
                    check_rotated(&x[t * row + h * head], {from, from + 2 * half}, &cos[t * half], &sin[t * half], half,
                                  true);
                }
                for (int64_t i = 0; i < rank; ++i)
                    CHECK(cache[slots[t] * slot + i] == latents[t * latent_row + i], t, i);
                check_rotated(&cache[slots[t] * slot + rank], numbers(&latents[t * latent_row + rank], 2 * half),
                              &cos[t * half], &sin[t * half], half, true);
            }
            check_replay(cache, [&] { restore(x, before), cache.clear(); }, write);
        }
    }
}

template <typename T, typename Table>
void qkv_ropes() {
    Random random;
    for (const int64_t half : {1, 8, 17}) {
        for (const int64_t num_rows : {0, 1, 4}) {
            for (const bool with_norms : {false, true}) {
                const int64_t num_q = 3, num_kv = 2, dim = 2 * half, row = (num_q + 2 * num_kv) * dim + 1;
                Buffer<T> qkv(span(num_rows, row, row - 1)), keys(5 * num_kv * dim), values(5 * num_kv * dim);
                Buffer<T> q_norm(with_norms ? dim : 0), k_norm(with_norms ? dim : 0);
                Buffer<Table> cos(num_rows * half), sin(num_rows * half);
                Buffer<int64_t> slots(num_rows);
                fill_uniform(qkv, random), fill_uniform(q_norm, random), fill_uniform(k_norm, random);
                fill_uniform(cos, random), fill_uniform(sin, random);
                for (int64_t t = 0; t < num_rows; ++t) slots[t] = 4 - t;
                const std::string before = qkv.bytes();
                const auto write = [&] {
                    call::rope_heads(qkv.data(), row, q_norm.data(), k_norm.data(), 1e-6f, cos.data(), sin.data(),
                                     keys.data(), values.data(), slots.data(), num_rows, num_q, num_kv, dim,
                                     sizeof(T) == 4, sizeof(Table) == 4, num_rows == 4 ? 2 : 1);
                };
                const std::vector<double> plain = numbers(qkv.data(), qkv.size());
                write();
                for (int64_t t = 0; t < num_rows; ++t) {
                    for (int64_t h = 0; h < num_q + num_kv; ++h) {
                        std::vector<double> x(plain.begin() + t * row + h * dim,
                                              plain.begin() + t * row + (h + 1) * dim);
                        double squares = 0;
                        for (const double value : x) squares += value * value;
                        Buffer<T>& weight = h < num_q ? q_norm : k_norm;
                        for (int64_t i = 0; with_norms && i < dim; ++i)
                            x[i] *= to_float(weight[i]) / std::sqrt(squares / double(dim) + 1e-6);
                        const T* got =
                            h < num_q ? &qkv[t * row + h * dim] : &keys[(slots[t] * num_kv + h - num_q) * dim];
                        check_rotated(got, x, &cos[t * half], &sin[t * half], half, false);
                    }
                    for (int64_t i = 0; i < num_kv * dim; ++i)
                        CHECK(values[slots[t] * num_kv * dim + i] == qkv[t * row + (num_q + num_kv) * dim + i], t, i);
                }
                check_replay(keys, [&] { restore(qkv, before), keys.clear(); }, write);
            }
        }
    }
}

}  // namespace

TEST_AT_EDGES(rotations_and_latents) { ropes<float, float>(), ropes<bf16, float>(), ropes<bf16, bf16>(); }
TEST_AT_EDGES(rotations_of_queries_and_keys) {
    qkv_ropes<float, float>(), qkv_ropes<bf16, float>(), qkv_ropes<bf16, bf16>();
}
