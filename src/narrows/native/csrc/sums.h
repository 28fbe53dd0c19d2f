// float32 sums of numbers stored as float32, bf16 or float16, in a fixed order, rounded once. Knows no rank.
#pragma once

#include <cstdint>

namespace sums {

enum Dtype : int64_t { float32, bfloat16, float16 };

// One addend: numbers of one kind, one after the other.
struct Part {
    const char* data;
    int64_t dtype;
};

inline int64_t size_of(int64_t dtype) { return dtype == float32 ? 4 : 2; }

// out[i] = ((part_0[i] + part_1[i]) + part_2[i]) + ..., in the dtype of part 0. `out` overlaps no part.
void sum(char* out, const Part* parts, int64_t num_parts, int64_t count);

}  // namespace sums
