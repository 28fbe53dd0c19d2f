// The router: logits in float32 and the choice of experts, in one call.
#include <algorithm>
#include <vector>

#include "kernels/each_row.h"
#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

// R rows times all experts' rows, in float32: sixteen partial sums each, added up at the end.
template <int R, typename T>
void logits_of(float* out, int64_t out_stride, const T* x, int64_t x_stride, const float* gate, int64_t num_experts,
               int64_t width) {
    constexpr int AT_ONCE = 4;
    for (int64_t first = 0; first < num_experts; first += AT_ONCE) {
        const float* row[AT_ONCE];
        for (int e = 0; e < AT_ONCE; ++e) row[e] = gate + std::min(first + e, num_experts - 1) * width;
        F32x16 sum[R][AT_ONCE];
        for (int r = 0; r < R; ++r) {
            for (int e = 0; e < AT_ONCE; ++e) sum[r][e] = zero();
        }
        for (int64_t h = 0; h < width; h += 16) {
            const Lanes here = first_lanes(width - h);
            F32x16 w[AT_ONCE];
#pragma GCC unroll 4
            for (int e = 0; e < AT_ONCE; ++e) w[e] = load(row[e] + h, here);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F32x16 value = load(x + r * x_stride + h, here);
#pragma GCC unroll 4
                for (int e = 0; e < AT_ONCE; ++e) sum[r][e] = mul_add(value, w[e], sum[r][e]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int e = 0; e < AT_ONCE && first + e < num_experts; ++e) {
                out[r * out_stride + first + e] = reduce_sum(sum[r][e]);
            }
        }
    }
}

// A routing rule, as ops/route.py states it.
struct Rule {
    int64_t top_k, num_groups, topk_group;  // num_groups 1: none
    int softmax, two_best;                  // two_best: a group is worth the sum of its two best, else its best
    int normalise;
    float factor;
};

// The `count` best of values[0 .. size) where `allowed` says so (null: all), falling, equal ones by rising id.
void best(const float* values, int64_t size, const uint8_t* allowed, int64_t per_flag, int64_t count, int64_t* ids) {
    int64_t held = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (allowed != nullptr && !allowed[i / per_flag]) continue;
        int64_t at = held;
        while (at > 0 && !(values[i] <= values[ids[at - 1]])) --at;
        if (at == count) continue;
        held = std::min(held + 1, count);
        for (int64_t j = held - 1; j > at; --j) ids[j] = ids[j - 1];
        ids[at] = i;
    }
}

void route_row(int32_t* ids, float* weights, const float* logits, const float* bias, int64_t num_experts,
               const Rule& rule, float* score, float* choice, float* worth, uint8_t* allowed, int64_t* chosen) {
    const F32x16 one = set(1.0f);
    if (rule.softmax) {
        const float most = *std::max_element(logits, logits + num_experts);
        F32x16 sum = zero();
        for (int64_t e = 0; e < num_experts; e += 16) {
            const Lanes here = first_lanes(num_experts - e);
            const F32x16 y = keep(exp(load(logits + e, here) - set(most)), here);
            store(score + e, y, here);
            sum = sum + y;
        }
        const float total = reduce_sum(sum);
        for (int64_t e = 0; e < num_experts; ++e) score[e] /= total;
    } else {
        for (int64_t e = 0; e < num_experts; e += 16) {
            const Lanes here = first_lanes(num_experts - e);
            const F32x16 y = exp(zero() - load(logits + e, here));
            store(score + e, one / (one + y), here);
        }
    }
    for (int64_t e = 0; e < num_experts; ++e) choice[e] = bias == nullptr ? score[e] : score[e] + bias[e];
    const int64_t size = num_experts / rule.num_groups;
    if (rule.num_groups > 1) {
        for (int64_t g = 0; g < rule.num_groups; ++g) {
            const int64_t count = rule.two_best && size > 1 ? 2 : 1;
            best(choice + g * size, size, nullptr, 1, count, chosen);
            worth[g] = choice[g * size + chosen[0]] + (count == 2 ? choice[g * size + chosen[1]] : 0.0f);
        }
        best(worth, rule.num_groups, nullptr, 1, rule.topk_group, chosen);
        std::fill(allowed, allowed + rule.num_groups, 0);
        for (int64_t i = 0; i < rule.topk_group; ++i) allowed[chosen[i]] = 1;
    }
    best(choice, num_experts, rule.num_groups > 1 ? allowed : nullptr, size, rule.top_k, chosen);
    float sum = 0.0f;
    for (int64_t k = 0; k < rule.top_k; ++k) {
        ids[k] = int32_t(chosen[k]);
        weights[k] = score[chosen[k]];
        sum += weights[k];
    }
    for (int64_t k = 0; k < rule.top_k; ++k) {
        weights[k] = (rule.normalise ? weights[k] / (sum + 1e-20f) : weights[k]) * rule.factor;
    }
}

template <typename T>
void route_rows(int32_t* ids, float* weights, const T* x, int64_t x_stride, const float* gate, const float* bias,
                int64_t num_rows, int64_t num_experts, int64_t width, const Rule& rule, int num_threads) {
    constexpr int64_t R = 4;
    for_rows((num_rows + R - 1) / R, R * num_experts * width / 8, num_threads, [&](int64_t block) {
        static thread_local std::vector<float> numbers;
        static thread_local std::vector<int64_t> chosen;
        static thread_local std::vector<uint8_t> allowed;
        numbers.resize((R + 3) * num_experts);
        chosen.resize(num_experts + 2);
        allowed.resize(num_experts);
        float *logits = numbers.data(), *score = logits + R * num_experts;
        const int64_t first = block * R, count = std::min(R, num_rows - first);
        if (count == R) {
            logits_of<R>(logits, num_experts, x + first * x_stride, x_stride, gate, num_experts, width);
        } else {
            for (int64_t r = 0; r < count; ++r) {
                logits_of<1>(logits + r * num_experts, num_experts, x + (first + r) * x_stride, x_stride, gate,
                             num_experts, width);
            }
        }
        for (int64_t r = 0; r < count; ++r) {
            route_row(ids + (first + r) * rule.top_k, weights + (first + r) * rule.top_k, logits + r * num_experts,
                      bias, num_experts, rule, score, score + num_experts, score + 2 * num_experts, allowed.data(),
                      chosen.data());
        }
    });
}

}  // namespace

// Logits x gate^T in float32, then the rule: ids and weights [num_rows, top_k]. gate [num_experts, width] and bias
// (null: none) float32.
void router(int32_t* ids, float* weights, const void* x, int64_t x_stride, const float* gate, const float* bias,
            int64_t num_rows, int64_t num_experts, int64_t width, int64_t top_k, int64_t num_groups, int64_t topk_group,
            int softmax, int two_best, int normalise, float factor, int wide, int num_threads) {
    const Rule rule{top_k, num_groups, topk_group, softmax, two_best, normalise, factor};
    with_type(wide, [&]<typename T>(T*) {
        route_rows(ids, weights, static_cast<const T*>(x), x_stride, gate, bias, num_rows, num_experts, width, rule,
                   num_threads);
    });
}

}  // namespace narrows::NARROWS_TARGET
