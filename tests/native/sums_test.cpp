// Sums of several dtypes, to the bit: added in order in float32, and rounded once.
#include "check.h"

using namespace testing;

namespace {

// A whole number below 2048 as float16: rounding to that is the CPU's, and no affair of this test.
uint16_t half_of(int64_t number) {
    if (number == 0) return 0;
    const int64_t size = std::abs(number), power = 63 - __builtin_clzll(uint64_t(size));
    return uint16_t((number < 0) << 15 | (power + 15) << 10 | (size << 10 >> power & 0x3ff));
}

float number_at(const char* data, int64_t dtype, int64_t i, const std::vector<float>& halves) {
    if (dtype == sums::float16) return halves[i];
    if (dtype == sums::float32) return to_float(reinterpret_cast<const float*>(data)[i]);
    return to_float(reinterpret_cast<const bf16*>(data)[i]);
}

void check_sum(const std::vector<int64_t>& dtypes, int64_t count) {
    Random random(count);
    std::vector<Buffer<char>*> memory;
    std::vector<std::vector<float>> halves(dtypes.size());
    std::vector<sums::Part> parts;
    const bool to_half = dtypes[0] == sums::float16;
    for (size_t i = 0; i < dtypes.size(); ++i) {
        const int64_t size = sums::size_of(dtypes[i]);
        memory.push_back(new Buffer<char>(count * size));
        char* data = memory.back()->data();
        for (int64_t n = 0; n < count; ++n) {
            const float whole = random.whole(200), any = to_half ? whole : random.uniform() * (n % 5 ? 1.0f : 1e-39f);
            if (dtypes[i] == sums::float32) std::memcpy(data + 4 * n, &any, 4);
            const uint16_t two = dtypes[i] == sums::bfloat16 ? to_bf16(any) : half_of(int64_t(whole));
            if (dtypes[i] != sums::float32) std::memcpy(data + 2 * n, &two, 2);
            if (dtypes[i] == sums::float16) halves[i].push_back(whole);
        }
        parts.push_back({data, dtypes[i]});
    }
    Buffer<char> out(count * sums::size_of(dtypes[0]));
    call::sum(out.data(), parts.data(), int64_t(parts.size()), count);
    for (int64_t n = 0; n < count; ++n) {
        float want = number_at(parts[0].data, dtypes[0], n, halves[0]);
        for (size_t i = 1; i < parts.size(); ++i) want += number_at(parts[i].data, dtypes[i], n, halves[i]);
        if (dtypes[0] == sums::float32) {
            CHECK(reinterpret_cast<float*>(out.data())[n] == want, count, n);
        } else {
            const uint16_t got = reinterpret_cast<uint16_t*>(out.data())[n];
            CHECK(got == (to_half ? half_of(int64_t(want)) : to_bf16(want)), dtypes[0], count, n, got);
        }
    }
    for (Buffer<char>* buffer : memory) delete buffer;
}

}  // namespace

TEST_AT_EDGES(sums_of_every_dtype) {
    for (const int64_t count : {0, 1, 15, 63, 64, 65, 130, 200}) {
        for (const int64_t dtype : {sums::float32, sums::bfloat16, sums::float16}) {
            check_sum({dtype}, count);
            check_sum({dtype, dtype, dtype}, count);
            check_sum({dtype, sums::float32, sums::bfloat16}, count);
            check_sum({dtype, sums::float16, sums::bfloat16, sums::float16}, count);
        }
    }
}

// All float16 there are, those too that are denormal or no numbers: a sum with nothing is the number itself.
TEST(float16_there_and_back) {
    Buffer<uint16_t> all(1 << 16), same(1 << 16);
    Buffer<float> wide(1 << 16), zeros(1 << 16);
    for (int64_t i = 0; i < all.size(); ++i) all[i] = uint16_t(i);
    for (float& x : zeros) x = -0.0f;
    const sums::Part from{reinterpret_cast<const char*>(all.data()), sums::float16};
    const sums::Part nothing{reinterpret_cast<const char*>(zeros.data()), sums::float32};
    const sums::Part widened[] = {nothing, from};
    call::sum(reinterpret_cast<char*>(wide.data()), widened, 2, all.size());
    call::sum(reinterpret_cast<char*>(same.data()), &from, 1, all.size());
    for (int64_t i = 0; i < all.size(); ++i) {
        const int64_t exponent = i >> 10 & 31, mantissa = i & 1023;
        const double size = exponent ? std::ldexp(1024 + mantissa, int(exponent) - 25) : std::ldexp(mantissa, -24);
        const bool no_number = exponent == 31 && (mantissa ? std::isnan(wide[i]) : std::isinf(wide[i]));
        CHECK(no_number || (wide[i] == (i >> 15 ? -size : size) && same[i] == i), i, wide[i], same[i]);
    }
}

// float32 between two float16: the nearest, ties to even; too large ones become infinite.
TEST(float16_is_rounded_to_the_nearest) {
    const std::pair<float, uint16_t> known[] = {
        {1.0f + 0x1p-11f, 0x3c00}, {1.0f + 0x3p-11f, 0x3c02}, {1.0f + 0x1.2p-11f, 0x3c01}, {65519.0f, 0x7bff},
        {65520.0f, 0x7c00},        {-1e9f, 0xfc00},           {0x1p-25f, 0x0000},          {0x1.8p-25f, 0x0001},
        {0x3p-25f, 0x0002},        {-0x1p-14f, 0x8400},       {0x1.ffep-15f, 0x0400},      {0x1p-40f, 0x0000}};
    constexpr int64_t count = std::size(known);
    Buffer<float> x(count);
    Buffer<uint16_t> zeros(count), out(count);
    for (int64_t i = 0; i < count; ++i) x[i] = known[i].first, zeros[i] = 0x8000;
    const sums::Part parts[] = {{reinterpret_cast<const char*>(zeros.data()), sums::float16},
                                {reinterpret_cast<const char*>(x.data()), sums::float32}};
    call::sum(reinterpret_cast<char*>(out.data()), parts, 2, count);
    for (int64_t i = 0; i < count; ++i) CHECK(out[i] == known[i].second, i, out[i]);
}

TEST(sums_of_bf16_that_are_no_numbers) {
    Buffer<bf16> x(130), out(130);
    for (int64_t i = 0; i < 130; ++i) x[i] = stored<bf16>(i % 3 ? 1.0f : i % 2 ? NAN : INFINITY);
    const sums::Part parts[] = {{reinterpret_cast<const char*>(x.data()), sums::bfloat16},
                                {reinterpret_cast<const char*>(x.data()), sums::bfloat16}};
    call::sum(reinterpret_cast<char*>(out.data()), parts, 2, 130);
    for (int64_t i = 0; i < 130; ++i) {
        const float got = to_float(out[i]);
        CHECK(i % 3 ? got == 2.0f : i % 2 ? std::isnan(got) : std::isinf(got), i);
    }
}
