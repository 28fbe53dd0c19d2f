// Norms, router, embedding, argmax and int8 rows against loops over single numbers.
#include "check.h"

using namespace testing;

namespace {

// What out of [1, width] must be; `got` is near it.
template <typename T>
void check_norm(const T* got, const T* x, const T* weight, int64_t width, float eps) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += double(to_float(x[i])) * to_float(x[i]);
    const double scale = 1.0 / std::sqrt(squares / double(width) + eps);
    const double tolerance = sizeof(T) == 4 ? 1e-5 : 0.02;
    for (int64_t i = 0; i < width; ++i)
        CHECK(near(to_float(got[i]), to_float(x[i]) * scale * to_float(weight[i]), tolerance), width, i);
}

template <typename T>
void norms() {
    constexpr int wide = sizeof(T) == 4;
    Random random;
    for (const int64_t width : {1, 15, 16, 17, 33, 70}) {
        for (const int64_t num_rows : {0, 1, 3}) {
            const int64_t heads = 2, head = width + 3, stride = heads * head + 1;
            Buffer<T> x(num_rows ? span(num_rows, stride, head + width) : 0), weight(width);
            Buffer<T> out(num_rows * heads * width);
            fill_uniform(x, random), fill_uniform(weight, random);
            const auto norm = [&] {
                call::rms_norm(out.data(), heads * width, width, x.data(), stride, head, weight.data(), num_rows, heads,
                               width, 1e-6f, wide, 1);
            };
            norm();
            for (int64_t t = 0; t < num_rows * heads; ++t)
                check_norm(&out[t * width], &x[t / heads * stride + t % heads * head], weight.data(), width, 1e-6f);
            check_replay(out, norm);

            Buffer<T> a(num_rows * width), b(num_rows * width), sum(num_rows * width), normed(num_rows * width);
            fill_whole(a, random), fill_whole(b, random);
            const auto add_norm = [&] {
                call::add_rms_norm(normed.data(), sum.data(), a.data(), b.data(), weight.data(), num_rows, width, 1e-5f,
                                   wide, 1);
            };
            add_norm();
            for (int64_t i = 0; i < num_rows * width; ++i)
                CHECK(to_float(sum[i]) == to_float(a[i]) + to_float(b[i]), i);
            for (int64_t t = 0; t < num_rows; ++t)
                check_norm(&normed[t * width], &sum[t * width], weight.data(), width, 1e-5f);
            check_replay(normed, add_norm);
            const auto add = [&] { call::add_rows(sum.data(), a.data(), b.data(), num_rows, width, wide, 1); };
            check_replay(sum, add);
        }
    }
}

template <typename T>
void latent_norms() {
    Random random;
    for (const int64_t q_width : {0, 5, 24}) {
        for (const int64_t num_rows : {0, 1, 4}) {
            const int64_t kv_width = 19, width = q_width + kv_width + 7, stride = width + 2;
            Buffer<T> x(span(num_rows, stride, width)), q_weight(q_width), kv_weight(kv_width), out(num_rows * width);
            fill_uniform(x, random), fill_uniform(q_weight, random), fill_uniform(kv_weight, random);
            const auto norm = [&] {
                call::latent_norm(out.data(), x.data(), stride, q_weight.data(), q_width, kv_weight.data(), kv_width,
                                  width, num_rows, 1e-6f, sizeof(T) == 4, 1);
            };
            norm();
            for (int64_t t = 0; t < num_rows; ++t) {
                const T *from = &x[t * stride], *to = &out[t * width];
                check_norm(to, from, q_weight.data(), q_width, 1e-6f);
                check_norm(to + q_width, from + q_width, kv_weight.data(), kv_width, 1e-6f);
                for (int64_t i = q_width + kv_width; i < width; ++i) CHECK(to[i] == from[i], t, i);
            }
            check_replay(out, norm);
        }
    }
}

struct Routing {
    int64_t num_experts, top_k, num_groups, topk_group;
    int softmax, two_best, normalise;
    bool with_bias;
};

// One row of the rule, expert by expert. `logits` are exact, so scores differ by rounding alone.
void check_route(const int32_t* ids, const float* weights, const std::vector<double>& logits, const float* bias,
                 const Routing& rule) {
    const int64_t num = rule.num_experts, size = num / rule.num_groups;
    std::vector<double> score(num), choice(num);
    double total = 0;
    for (const double x : logits) total += std::exp(x);
    for (int64_t e = 0; e < num; ++e) {
        score[e] = rule.softmax ? std::exp(logits[e]) / total : 1 / (1 + std::exp(-logits[e]));
        choice[e] = score[e] + (bias ? bias[e] : 0);
    }
    const auto rank_of = [](const std::vector<double>& x, int64_t i, auto counts) {
        int64_t before = 0;
        for (int64_t j = 0; j < int64_t(x.size()); ++j) before += counts(j) && (x[j] > x[i] || (x[j] == x[i] && j < i));
        return before;
    };
    std::vector<double> worth(rule.num_groups);
    for (int64_t g = 0; g < rule.num_groups; ++g) {
        std::vector<double> in(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(in.rbegin(), in.rend());
        worth[g] = in[0] + (rule.two_best && size > 1 ? in[1] : 0);
    }
    const auto all = [](int64_t) { return true; };
    const auto allowed = [&](int64_t e) {
        return rule.num_groups == 1 || rank_of(worth, e / size, all) < rule.topk_group;
    };
    double sum = 0;
    for (int64_t k = 0; k < rule.top_k; ++k) sum += score[ids[k]];
    for (int64_t k = 0; k < rule.top_k; ++k) {
        CHECK(allowed(ids[k]) && rank_of(choice, ids[k], allowed) == k, k, ids[k]);
        CHECK(near(weights[k], score[ids[k]] / (rule.normalise ? sum : 1.0) * 2.5, 1e-5), k);
    }
}

template <typename T>
void routers() {
    const Routing rules[] = {{20, 4, 4, 2, 0, 1, 1, true},
                             {20, 4, 4, 3, 1, 0, 0, false},
                             {17, 5, 1, 1, 1, 0, 1, false},
                             {20, 3, 20, 5, 0, 1, 1, true},
                             {1, 1, 1, 1, 0, 0, 1, false}};
    Random random;
    for (const Routing& rule : rules) {
        for (const int64_t num_rows : {0, 1, 4, 7}) {
            const int64_t width = 35, stride = width + 2;
            Buffer<T> x(span(num_rows, stride, width));
            Buffer<float> gate(rule.num_experts * width), bias(rule.with_bias ? rule.num_experts : 0);
            fill_whole(x, random);
            for (float& g : gate) g = random.whole(1000) / 8192;
            for (float& b : bias) b = random.whole(1000) / 10000;
            Buffer<int32_t> ids(num_rows * rule.top_k);
            Buffer<float> weights(num_rows * rule.top_k);
            const auto route = [&] {
                call::router(ids.data(), weights.data(), x.data(), stride, gate.data(), bias.data(), num_rows,
                             rule.num_experts, width, rule.top_k, rule.num_groups, rule.topk_group, rule.softmax,
                             rule.two_best, rule.normalise, 2.5f, sizeof(T) == 4, 1);
            };
            route();
            for (int64_t t = 0; t < num_rows; ++t) {
                std::vector<double> logits(rule.num_experts);
                for (int64_t e = 0; e < rule.num_experts; ++e)
                    for (int64_t h = 0; h < width; ++h)
                        logits[e] += double(to_float(x[t * stride + h])) * gate[e * width + h];
                check_route(&ids[t * rule.top_k], &weights[t * rule.top_k], logits, bias.data(), rule);
            }
            check_replay(ids, route);
        }
    }
}

template <typename T>
void argmaxes() {
    Random random;
    for (const int64_t width : {1, 15, 16, 17, 50}) {
        const int64_t num_rows = 6, stride = width + 1;
        Buffer<T> x(span(num_rows, stride, width));
        fill_whole(x, random);
        for (int64_t i = 0; i < width; ++i) x[i] = stored<T>(-INFINITY);
        x[stride + width / 2] = stored<T>(NAN);
        x[2 * stride + width - 1] = stored<T>(INFINITY);
        Buffer<double> out(2 * num_rows);
        const auto argmax = [&] {
            call::argmax(out.data(), x.data(), stride, num_rows, width, 100, sizeof(T) == 4, 1);
        };
        argmax();
        for (int64_t t = 0; t < num_rows; ++t) {
            int64_t best = 0;
            for (int64_t i = 1; i < width; ++i) {
                const float a = to_float(x[t * stride + i]), b = to_float(x[t * stride + best]);
                if (!std::isnan(b) && (std::isnan(a) || a > b)) best = i;
            }
            CHECK(out[2 * t + 1] == double(100 + best), width, t);
        }
        check_replay(out, argmax);
    }
}

template <typename T>
void encodings() {
    Random random;
    for (const int64_t width : {0, 1, 15, 16, 17, 100}) {
        const int64_t num_rows = 5, stride = width + 2;
        Buffer<T> x(span(num_rows, stride, width)), back(num_rows * width);
        fill_uniform(x, random, 5.0f);
        for (int64_t i = 0; i < width; ++i) x[i] = 0, x[stride + i] = stored<T>(i == width / 2 ? INFINITY : 1.0f);
        Buffer<int8_t> codes(num_rows * width);
        Buffer<float> scales(num_rows);
        const auto encode = [&] {
            call::encode_rows(codes.data(), scales.data(), x.data(), stride, num_rows, width, sizeof(T) == 4, 1);
        };
        const auto decode = [&] {
            call::decode_rows(back.data(), codes.data(), scales.data(), num_rows, width, sizeof(T) == 4, 1);
        };
        encode(), decode();
        CHECK(scales[0] == 0.0f && (width == 0 || std::isnan(scales[1])), width);
        for (int64_t t = 2; t < num_rows; ++t) {
            float largest = 0;
            for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(to_float(x[t * stride + i])));
            CHECK(scales[t] == largest / 127.0f, width, t);
            for (int64_t i = 0; i < width; ++i) {
                const float exact = to_float(x[t * stride + i]) / scales[t];
                CHECK(float(codes[t * width + i]) == std::nearbyint(exact), width, t, i);
                CHECK(near(to_float(back[t * width + i]), codes[t * width + i] * scales[t], 0.01), width, t, i);
            }
        }
        check_replay(codes, encode);
        check_replay(back, decode);
    }
}

}  // namespace

TEST_AT_EDGES(norms_of_rows) { norms<float>(), norms<bf16>(); }
TEST_AT_EDGES(norms_of_latents) { latent_norms<float>(), latent_norms<bf16>(); }
TEST_AT_EDGES(routing_rules) { routers<float>(), routers<bf16>(); }
TEST_AT_EDGES(largest_columns) { argmaxes<float>(), argmaxes<bf16>(); }
TEST_AT_EDGES(rows_as_int8_and_back) { encodings<float>(), encodings<bf16>(); }

TEST_AT_EDGES(embedding_of_ids_here_and_elsewhere) {
    for (const int64_t num_rows : {0, 1, 5}) {
        const int64_t row_bytes = 6, num_ids = 3, stride = row_bytes + 2, first = 10;
        Buffer<char> table(num_ids * row_bytes), out(span(num_rows, stride, row_bytes));
        Buffer<int64_t> ids(num_rows);
        for (int64_t i = 0; i < table.size(); ++i) table[i] = char(i + 1);
        for (int64_t t = 0; t < num_rows; ++t) ids[t] = first - 1 + t;
        const auto embed = [&] {
            call::embedding(out.data(), stride, ids.data(), num_rows, table.data(), first, num_ids, row_bytes);
        };
        embed();
        for (int64_t t = 0; t < num_rows; ++t)
            for (int64_t i = 0; i < row_bytes; ++i)
                CHECK(out[t * stride + i] == (t >= 1 && t <= num_ids ? table[(t - 1) * row_bytes + i] : 0), t, i);
        check_replay(out, embed);
    }
}

TEST_AT_EDGES(pick_of_pairs) {
    const double pairs[4][6] = {
        {1, 7, 3, 5, 2, 6}, {3, 9, 3, 4, 1, 0}, {NAN, 8, 9, 1, NAN, 2}, {-INFINITY, 3, NAN, 1, 5, 0}};
    const int64_t want[] = {5, 4, 2, 1};
    Buffer<double> held(4 * 6);
    std::memcpy(held.data(), pairs, sizeof pairs);
    Buffer<int64_t> out(4);
    const auto pick = [&] { call::pick(out.data(), held.data(), 6, 4, 3); };
    pick();
    for (int64_t t = 0; t < 4; ++t) CHECK(out[t] == want[t], t);
    check_replay(out, pick);
}

TEST(rows_shared_out_to_threads) {
    const int64_t num_rows = 67, width = 1001, num_experts = 9;
    Random random;
    Buffer<float> x(num_rows * width), weight(width), one(num_rows * width), two(num_rows * width);
    Buffer<float> gate(num_experts * width), worth(num_rows * 2), worth_two(num_rows * 2);
    Buffer<int32_t> ids(num_rows * 2), ids_two(num_rows * 2);
    fill_uniform(x, random), fill_uniform(weight, random), fill_uniform(gate, random, 0.1f);
    for (const int threads : {1, 3}) {
        Buffer<float>& out = threads == 1 ? one : two;
        call::rms_norm(out.data(), width, 0, x.data(), width, 0, weight.data(), num_rows, 1, width, 1e-6f, 1, threads);
        call::router((threads == 1 ? ids : ids_two).data(), (threads == 1 ? worth : worth_two).data(), x.data(), width,
                     gate.data(), nullptr, num_rows, num_experts, width, 2, 1, 1, 1, 0, 1, 1.0f, 1, threads);
    }
    CHECK(one.bytes() == two.bytes() && ids.bytes() == ids_two.bytes() && worth.bytes() == worth_two.bytes());
}
