// What sums are taken of: numbers stored as float32, bf16 or float16.
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

}  // namespace sums
