// Sums of numbers stored as float32, bf16 or float16, in a fixed order in float32, rounded once: a few vectors at a
// time, so that every number is read once and the running sum stays in registers.
//
// bf16 is rounded to nearest, ties to even, also what is denormal; a NaN stays one.
#include <algorithm>
#include <cstring>

#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

using sums::bfloat16, sums::float16, sums::float32, sums::Part, sums::size_of;

constexpr int64_t lanes = 16;
constexpr int64_t depth = 4;  // vectors at a time
constexpr int64_t block = lanes * depth;

template <int64_t dtype>
F32x16 at(const char* p) {
    if constexpr (dtype == float32) return load(reinterpret_cast<const float*>(p));
    if constexpr (dtype == bfloat16) return load(reinterpret_cast<const bf16*>(p));
    if constexpr (dtype == float16) return load_f16(reinterpret_cast<const uint16_t*>(p));
}

template <int64_t dtype>
void put(char* p, F32x16 x) {
    if constexpr (dtype == float32) store(reinterpret_cast<float*>(p), x);
    if constexpr (dtype == bfloat16) store_exactly(reinterpret_cast<bf16*>(p), x);
    if constexpr (dtype == float16) store_f16(reinterpret_cast<uint16_t*>(p), x);
}

// One block of a part joins the sum, or begins it.
template <int64_t dtype, bool first>
void join(F32x16 (&total)[depth], const char* from) {
    for (int64_t i = 0; i < depth; i++) {
        const F32x16 x = at<dtype>(from + i * lanes * size_of(dtype));
        if constexpr (first)
            total[i] = x;
        else
            total[i] = total[i] + x;
    }
}

// Blocks `from` to `to` of the sum, in the dtype of part 0. `same`: all parts are of it.
template <int64_t dtype, bool same>
void sum_blocks(char* out, const Part* parts, int64_t num_parts, int64_t from, int64_t to) {
    for (int64_t start = from; start < to; start += block) {
        F32x16 total[depth];
        join<dtype, true>(total, parts[0].data + start * size_of(dtype));
        for (int64_t i = 1; i < num_parts; i++) {
            const Part& part = parts[i];
            const char* x = part.data + start * size_of(part.dtype);
            if (same || part.dtype == dtype)
                join<dtype, false>(total, x);
            else if (part.dtype == float32)
                join<float32, false>(total, x);
            else if (part.dtype == bfloat16)
                join<bfloat16, false>(total, x);
            else
                join<float16, false>(total, x);
        }
        if (dtype == bfloat16 && store_ordinary(reinterpret_cast<bf16*>(out) + start, total)) continue;
        for (int64_t i = 0; i < depth; i++) put<dtype>(out + (start + i * lanes) * size_of(dtype), total[i]);
    }
}

using Sum = void (*)(char*, const Part*, int64_t, int64_t, int64_t);

template <bool same>
Sum sum_of(int64_t dtype) {
    const Sum all[] = {sum_blocks<float32, same>, sum_blocks<bfloat16, same>, sum_blocks<float16, same>};
    return all[dtype];
}

// Less than a block, from number `from` on: in blocks of its own, so that nothing is read or written beyond the end.
void sum_rest(char* out, const Part* parts, int64_t num_parts, int64_t from, int64_t rest) {
    float total[block];
    char addend[block * sizeof(float)] = {};
    std::fill(total, total + block, -0.0f);  // what changes no number that it is added to
    char* const sum = reinterpret_cast<char*>(total);
    for (int64_t i = 0; i < num_parts; i++) {
        const int64_t size = size_of(parts[i].dtype);
        std::memcpy(addend, parts[i].data + from * size, size_t(rest * size));
        const Part two[2] = {{sum, float32}, {addend, parts[i].dtype}};
        sum_blocks<float32, false>(sum, two, 2, 0, block);
    }
    const int64_t dtype = parts[0].dtype;
    for (int64_t i = 0; i < block; i += lanes) {
        const F32x16 x = at<float32>(sum + i * sizeof(float));
        char* const to = addend + i * size_of(dtype);
        dtype == float32 ? put<float32>(to, x) : dtype == bfloat16 ? put<bfloat16>(to, x) : put<float16>(to, x);
    }
    std::memcpy(out, addend, size_t(rest * size_of(dtype)));
}

}  // namespace

// out[i] = ((part_0[i] + part_1[i]) + part_2[i]) + ..., in the dtype of part 0. `out` overlaps no part.
void sum(char* out, const Part* parts, int64_t num_parts, int64_t count) {
    const int64_t dtype = parts[0].dtype;
    const bool same = std::all_of(parts, parts + num_parts, [&](const Part& part) { return part.dtype == dtype; });
    const Sum add = same ? sum_of<true>(dtype) : sum_of<false>(dtype);
    const int64_t whole = count / block * block;
    add(out, parts, num_parts, 0, whole);
    if (whole == count) return;
    sum_rest(out + whole * size_of(dtype), parts, num_parts, whole, count - whole);
}

}  // namespace narrows::NARROWS_TARGET
