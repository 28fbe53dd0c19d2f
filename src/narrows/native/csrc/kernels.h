// The kernels as a table of functions, which each target fills with its own (kernels.def, targets.def).
#pragma once

#include <cstdint>

#include "numbers.h"
#include "sums.h"

namespace narrows {

// Of weight: ops/int8.py, and from Q4_0 on those that are held in blocks as checkpoints store them: ops/blocks.py.
enum Kind : int { BF16_WEIGHT, INT8, INT8_WEIGHT, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K };

// A packed weight: its panels, of an int8 one the scale of each output, and its kind.
struct Packed {
    const uint32_t* panels;
    const float* scales;
    int kind;
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
