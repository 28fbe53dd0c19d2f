// Sums of several dtypes, to the bit: added in order in float32, and rounded once.
#include "sums.cpp"

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
    sums::sum(out.data(), parts.data(), int64_t(parts.size()), count);
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
    const int64_t known = narrows_sums_dtypes();
    const bool halves = known >> sums::float16 & 1;
    if (!halves && testing::edge == Edge::heap) skip("float16 sums", "this build has no conversions of float16");
    for (const int64_t count : {0, 1, 15, 63, 64, 65, 130, 200}) {
        for (const int64_t dtype : {sums::float32, sums::bfloat16, sums::float16}) {
            if (!(known >> dtype & 1)) continue;
            check_sum({dtype}, count);
            check_sum({dtype, dtype, dtype}, count);
            check_sum({dtype, sums::float32, sums::bfloat16}, count);
            if (halves) check_sum({dtype, sums::float16, sums::bfloat16, sums::float16}, count);
        }
    }
}

TEST(sums_of_bf16_that_are_no_numbers) {
    Buffer<bf16> x(130), out(130);
    for (int64_t i = 0; i < 130; ++i) x[i] = stored<bf16>(i % 3 ? 1.0f : i % 2 ? NAN : INFINITY);
    const sums::Part parts[] = {{reinterpret_cast<const char*>(x.data()), sums::bfloat16},
                                {reinterpret_cast<const char*>(x.data()), sums::bfloat16}};
    sums::sum(reinterpret_cast<char*>(out.data()), parts, 2, 130);
    for (int64_t i = 0; i < 130; ++i) {
        const float got = to_float(out[i]);
        CHECK(i % 3 ? got == 2.0f : i % 2 ? std::isnan(got) : std::isinf(got), i);
    }
}
