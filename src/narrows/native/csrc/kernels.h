// The kernels as a table of functions, which each target fills with its own (kernels.def, targets.def).
#pragma once

#include <cstdint>

#include "numbers.h"
#include "sums.h"

namespace narrows {

enum Kind : int { BF16_WEIGHT = 0, INT8 = 1, INT8_WEIGHT = 2 };  // of weight: ops/int8.py

// A packed weight: its panels, and of an int8 one the scale of each output.
struct Packed {
    const uint32_t* panels;
    const float* scales;
};

// torch's `at::native::cpublas::brgemm` for bf16 (M, N, K, lda, ldb, ldc, add to C, A, B in pairs as here, C, pairs)
// and `brgemm_release`, which gives the tiles of AMX back.
struct Brgemm {
    void (*product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const bf16*, const bf16*, float*, bool);
    void (*release)(bool);
};

// The kernels of one target.
struct Kernels {
#define KERNEL(NAME, CAPTURE, ...) void (*NAME)(__VA_ARGS__);
#include "kernels.def"
#undef KERNEL
};

}  // namespace narrows
