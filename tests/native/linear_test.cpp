// Products with packed weights against loops over single numbers; the memory that kernels keep.
#include "kernels/scratch.h"
#include "weights.h"

using namespace testing;

namespace {

// x, a weight and a bias of whole numbers: sums are exact, so results have to be right to the bit in any order. Rows of
// int8 kinds have 127 as their largest number, which leaves whole numbers as they are.
template <typename Out>
void check_linear(int kind, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, int threads, bool with_bias,
                  const Brgemm* brgemm) {
    Random random(num_rows * 100 + num_outputs);
    const int64_t x_stride = num_inputs + 1, out_stride = num_outputs + 3;
    Buffer<bf16> x(span(num_rows, x_stride, num_inputs)), bias(with_bias ? num_outputs : 0);
    Buffer<Out> out(span(num_rows, out_stride, num_outputs));
    fill_whole(x, random), fill_whole(bias, random);
    for (int64_t t = 0; t < num_rows && num_inputs; ++t)
        x[t * x_stride + num_inputs / 2] = stored<bf16>(kind == INT8 ? 127 : 2);
    Weights weight(1, num_outputs, num_inputs, kind, false, random);
    const auto product = [&] {
        call::linear(out.data(), out_stride, x.data(), x_stride, kind, weight.panels(), weight.scales(), bias.data(),
                     num_rows, num_outputs, num_inputs, sizeof(Out) == 4, threads, brgemm);
    };
    product();
    for (int64_t t = 0; t < num_rows; ++t) {
        for (int64_t o = 0; o < num_outputs; o += num_inputs > 1000 ? 16 : 1) {  // of large ones a few
            float sum = with_bias ? to_float(bias[o]) : 0.0f;
            for (int64_t k = 0; k < num_inputs; ++k) sum += to_float(x[t * x_stride + k]) * weight.at(0, o, k);
            const float got = to_float(out[t * out_stride + o]), want = to_float(stored<Out>(sum));
            CHECK(kind == INT8 ? near(got, want, 0.01) : got == want, kind, num_rows, num_outputs, num_inputs, t, o);
        }
    }
    check_replay(out, product);
}

}  // namespace

TEST_AT_EDGES(linear_of_odd_shapes) {
    for (const int kind : kinds()) {
        for (const int64_t num_rows : {0, 1, 5, 12, 13, 17}) {
            for (const auto& [outputs, inputs] : {std::pair{1, 1}, {33, 3}, {47, 30}, {64, 33}, {5, 0}, {32, 64}}) {
                check_linear<bf16>(kind, num_rows, outputs, inputs, 1, true, nullptr);
                check_linear<float>(kind, num_rows, outputs, inputs, 1, false, nullptr);
            }
        }
    }
}

TEST_AT_EDGES(linear_by_another_library) {
    for (const int64_t num_rows : {15, 16, 29}) {
        check_linear<bf16>(BF16_WEIGHT, num_rows, 47, 31, 1, true, &plain_brgemm);
        check_linear<float>(BF16_WEIGHT, num_rows, 40, 32, 2, false, &plain_brgemm);
    }
}

TEST(linear_on_threads_and_in_chunks) {
    for (const int kind : kinds()) {
        check_linear<bf16>(kind, 1, 3, 40, 3, true, nullptr);  // fewer panels than threads
        check_linear<bf16>(kind, 9, 100, 40, 3, true, nullptr);
        check_linear<float>(kind, 60, 70, 1024, 3, false, nullptr);   // rows that all threads pack together
        check_linear<float>(kind, 17, 33, 16400, 1, false, nullptr);  // several chunks
        check_linear<float>(kind, 17, 33, 16400, 2, false, nullptr);
    }
}

TEST_AT_EDGES(linear_of_few_rows_and_a_plain_weight) {
    Random random;
    for (const int64_t num_rows : {1, 2, 3, 4}) {
        for (const auto& [outputs, inputs] : {std::pair{1, 1}, {5, 31}, {7, 32}, {11, 75}}) {
            for (const int threads : {1, 2}) {
                const int64_t x_stride = inputs + 2, out_stride = outputs + 1;
                Buffer<bf16> x(span(num_rows, x_stride, inputs)), weight(outputs * inputs), bias(outputs);
                Buffer<bf16> out(span(num_rows, out_stride, outputs));
                fill_whole(x, random), fill_whole(weight, random), fill_whole(bias, random);
                const bf16* given_bias = threads == 1 ? bias.data() : nullptr;
                const auto product = [&, outputs = outputs, inputs = inputs] {
                    call::linear_few(out.data(), out_stride, x.data(), x_stride, weight.data(), given_bias, num_rows,
                                     outputs, inputs, threads);
                };
                product();
                for (int64_t t = 0; t < num_rows; ++t) {
                    for (int64_t o = 0; o < outputs; ++o) {
                        float sum = given_bias ? to_float(bias[o]) : 0.0f;
                        for (int64_t k = 0; k < inputs; ++k)
                            sum += to_float(x[t * x_stride + k]) * to_float(weight[o * inputs + k]);
                        CHECK(out[t * out_stride + o] == to_bf16(sum), num_rows, outputs, inputs, t, o);
                    }
                }
                check_replay(out, product);
            }
        }
    }
}

TEST_AT_EDGES(gates_and_ups) {
    for (const int kind : kinds()) {
        for (const int64_t num_rows : {0, 1, 13, 18}) {
            for (const auto& [inner, inputs] : {std::pair{1, 7}, {16, 32}, {21, 30}, {0, 8}, {40, 0}}) {
                Random random(num_rows);
                const int64_t stride = inner + 1;
                Buffer<bf16> x(num_rows * inputs), bias(2 * inner), out(span(num_rows, stride, inner));
                fill_uniform(x, random), fill_uniform(bias, random);
                Weights weight(1, 2 * inner, inputs, kind, true, random, 0.125f);
                const Brgemm* brgemm = num_rows == 18 ? &plain_brgemm : nullptr;
                const auto product = [&, inner = inner, inputs = inputs] {
                    call::gate_up(out.data(), stride, x.data(), inputs, kind, weight.panels(), weight.scales(),
                                  bias.data(), num_rows, inner, inputs, num_rows == 13 ? 2 : 1, brgemm);
                };
                product();
                for (int64_t t = 0; t < num_rows; ++t) {
                    for (int64_t o = 0; o < inner; ++o) {
                        double gate = to_float(bias[o]), up = to_float(bias[inner + o]);
                        for (int64_t k = 0; k < inputs; ++k) {
                            gate += to_float(x[t * inputs + k]) * weight.at(0, o, k);
                            up += to_float(x[t * inputs + k]) * weight.at(0, inner + o, k);
                        }
                        CHECK(near(to_float(out[t * stride + o]), silu(gate) * up, 0.04), kind, num_rows, inner, inputs,
                              t, o);
                    }
                }
                check_replay(out, product);
            }
        }
    }
}

// Weights in blocks of random bytes: rows of any number give each row's own bits, and nothing beyond a panel is read.
TEST_AT_EDGES(linear_with_blocks) {
    struct Blocks {
        int kind;
        int64_t inputs, bytes, halves;
    };
    for (const Blocks& of :
         {Blocks{Q4_0, 32, 18, 1}, {Q8_0, 32, 34, 1}, {Q4_K, 256, 144, 2}, {Q5_K, 256, 176, 2}, {Q6_K, 256, 210, 1}}) {
        for (const auto& [outputs, blocks] : {std::pair{1, 1}, {33, 3}, {64, 9}, {5, 0}}) {
            Random random(of.kind + outputs);
            const int64_t inputs = blocks * of.inputs, most = 29, num_blocks = panels_of(outputs) * blocks;
            Buffer<uint32_t> panels(num_blocks * of.bytes * 8);
            uint8_t* bytes = reinterpret_cast<uint8_t*>(panels.data());
            for (int64_t i = 0; i < panels.size() * 4; ++i) bytes[i] = uint8_t(random.whole(127) + 127);
            for (int64_t b = 0; b < num_blocks; ++b) {
                uint16_t* halves = reinterpret_cast<uint16_t*>(bytes + b * of.bytes * 32);
                for (int64_t i = 0; i < of.halves * 32; ++i) halves[i] = uint16_t(0x1c00 + i);  // about 0.004
            }
            Buffer<bf16> x(most * inputs), bias(outputs);
            fill_uniform(x, random), fill_uniform(bias, random);
            Buffer<float> all(most * outputs);
            const auto product = [&, outputs = outputs] {
                call::linear(all.data(), outputs, x.data(), inputs, of.kind, panels.data(), nullptr, bias.data(), most,
                             outputs, inputs, 1, 2, nullptr);
            };
            product();
            check_replay(all, product);
            Buffer<int64_t> ids(4);
            ids[0] = 7, ids[1] = 7 + outputs - 1, ids[2] = 6, ids[3] = 7 + outputs;
            Buffer<bf16> table(4 * inputs);
            const auto lookup = [&, outputs = outputs] {
                call::embedding_blocks(table.data(), inputs, ids.data(), 4, panels.data(), of.kind, 7, outputs, inputs);
            };
            lookup();
            check_replay(table, lookup);
            for (int64_t i = 0; i < 4 * inputs; ++i)
                CHECK(i < 2 * inputs ? std::isfinite(to_float(table[i])) : table[i] == 0, of.kind, i);
            for (const int64_t rows : {0, 1, 4, 12}) {
                Buffer<float> some(rows * outputs);
                call::linear(some.data(), outputs, x.data(), inputs, of.kind, panels.data(), nullptr, bias.data(), rows,
                             outputs, inputs, 1, 1, nullptr);
                for (int64_t i = 0; i < rows * outputs; ++i)
                    CHECK(some[i] == all[i] && std::isfinite(all[i]), of.kind, rows, outputs, inputs, i);
            }
        }
    }
}

TEST(packing_is_not_replayed) {
    Buffer<uint32_t> panels(32);
    Buffer<bf16> row(2);
    Buffer<int8_t> codes(4);
    check_not_replayed([&] { call::gemm_pack(panels.data(), row.data(), 2, 0, 1, 2, -1); });
    check_not_replayed([&] { call::gemm_pack_int8(panels.data(), codes.data(), 4, 0, 1, 4, -1); });
}

TEST(rows_of_int8_that_are_not_finite) {
    Random random;
    const int64_t num_inputs = 40, num_outputs = 32;
    Weights weight(1, num_outputs, num_inputs, INT8, false, random);
    Buffer<bf16> x(3 * num_inputs);
    Buffer<float> out(3 * num_outputs);
    for (bf16& value : x) value = stored<bf16>(1.0f);
    for (int64_t k = 0; k < 4; ++k) x[k] = stored<bf16>(NAN), x[num_inputs + k] = stored<bf16>(INFINITY);
    call::linear(out.data(), num_outputs, x.data(), num_inputs, INT8, weight.panels(), weight.scales(), nullptr, 3,
                 num_outputs, num_inputs, 1, 1, nullptr);
    for (int64_t o = 0; o < num_outputs; ++o)
        CHECK(std::isnan(out[o]) && !std::isfinite(out[num_outputs + o]) && std::isfinite(out[2 * num_outputs + o]), o);
}

TEST(scratch_is_nobody_elses_and_says_when_there_is_no_memory) {
    static_assert(!std::is_copy_constructible_v<narrows::Scratch> && !std::is_copy_assignable_v<narrows::Scratch>);
    narrows::Scratch scratch;
    char* const memory = scratch.of<char>(100);
    CHECK(uintptr_t(memory) % 64 == 0);
    std::memset(memory, 1, 128);
    CHECK(scratch.of<char>(0) != nullptr && scratch.of<char>(90) == memory);
    CHECK(narrows::Scratch().of<float>(0) != nullptr);
    CHECK(aborts_saying("no memory for", [&] { scratch.of<char>(int64_t(1) << 60)[0] = 1; }));
}
