// Routed and shared experts against loops over single numbers.
#include "weights.h"

using namespace testing;

namespace {

struct Shape {
    int64_t num_rows, top_k, num_experts, hidden, inner, shared_inner;
};

// `all_elsewhere`: nobody's expert is here. Ids are of experts 2, 3, ... here, and of others.
template <typename Out, typename Id>
void check_experts(int kind, const Shape& of, int threads, const narrows::Brgemm* brgemm, bool all_elsewhere = false) {
    const auto& [num_rows, top_k, num_experts, hidden, inner, shared_inner] = of;
    Random random(num_rows + hidden);
    constexpr int64_t first = 2;
    const int64_t x_stride = hidden + 1, out_stride = hidden + (num_rows % 2);
    Buffer<bf16> x(span(num_rows, x_stride, hidden));
    Buffer<Out> out(span(num_rows, out_stride, hidden));
    Buffer<Id> ids(num_rows * top_k);
    Buffer<float> weights(num_rows * top_k);
    fill_uniform(x, random), fill_uniform(weights, random);
    for (Id& id : ids) id = all_elsewhere ? Id(-1) : Id(random.below(num_experts + 3) + first - 1);
    const float scale = hidden > 1000 ? 1.0f / 128 : 0.125f;  // gates of ordinary size
    testing::Weights gate_up(num_experts, 2 * inner, hidden, kind, true, random, scale);
    testing::Weights down(num_experts, hidden, inner, kind, false, random, 0.125f);
    testing::Weights shared_gate_up(1, 2 * shared_inner, hidden, kind, true, random, scale);
    testing::Weights shared_down(1, hidden, shared_inner, kind, false, random, 0.125f);
    const Packed packed[] = {gate_up.packed(), down.packed(), shared_gate_up.packed(), shared_down.packed()};
    const auto run = [&] {
        call::experts(out.data(), out_stride, sizeof(Out) == 4, x.data(), x_stride, ids.data(), sizeof(Id) == 8,
                      weights.data(), num_rows, top_k, kind, packed, packed + 1, first, num_experts, hidden, inner,
                      packed + 2, packed + 3, shared_inner, threads, brgemm);
    };
    run();
    for (int64_t t = 0; t < num_rows; ++t) {
        std::vector<double> sum(hidden);
        const auto add = [&](testing::Weights& first_half, testing::Weights& second_half, int64_t expert, int64_t width,
                             float weight) {
            for (int64_t f = 0; f < width; ++f) {
                double gate = 0, up = 0;
                for (int64_t h = 0; h < hidden; ++h) {
                    gate += to_float(x[t * x_stride + h]) * first_half.at(expert, f, h);
                    up += to_float(x[t * x_stride + h]) * first_half.at(expert, width + f, h);
                }
                for (int64_t h = 0; h < hidden; ++h) sum[h] += weight * silu(gate) * up * second_half.at(expert, h, f);
            }
        };
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t expert = int64_t(ids[t * top_k + k]) - first;
            if (expert >= 0 && expert < num_experts) add(gate_up, down, expert, inner, weights[t * top_k + k]);
        }
        add(shared_gate_up, shared_down, 0, shared_inner, 1.0f);
        for (int64_t h = 0; h < hidden; ++h)
            CHECK(near(to_float(out[t * out_stride + h]), sum[h], 0.06), kind, num_rows, hidden, inner, t, h);
    }
    check_replay(out, run);
}

}  // namespace

TEST_AT_EDGES(experts_of_odd_shapes) {
    for (const int kind : kinds()) {
        for (const Shape& shape : {Shape{0, 2, 3, 16, 16, 0}, Shape{1, 2, 3, 33, 5, 7}, Shape{5, 3, 4, 50, 21, 0},
                                   Shape{14, 1, 1, 7, 17, 0}, Shape{4, 2, 3, 40, 0, 9}}) {
            check_experts<bf16, int32_t>(kind, shape, 1, nullptr);
            check_experts<float, int64_t>(kind, shape, 2, nullptr);
        }
        check_experts<bf16, int32_t>(kind, {3, 2, 4, 20, 6, 0}, 1, nullptr, true);
    }
}

TEST(experts_of_many_rows) {
    for (const int kind : kinds()) check_experts<bf16, int32_t>(kind, {60, 3, 2, 34, 18, 5}, 3, &plain_brgemm);
    check_experts<float, int32_t>(BF16_WEIGHT, {16, 1, 2, 8192, 3, 2}, 2, nullptr);  // several groups
}
