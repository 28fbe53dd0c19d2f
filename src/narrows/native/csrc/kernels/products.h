// The matrix products that linear.cpp and experts.cpp share: packed weights and packed rows, multiplied block by panel
// by the target's tiles (tile/).
//
// A bf16 weight [N, K] is held as panels of 32 outputs: [N / 32][K / 2][32][2], two neighbouring inputs side by side,
// as vdpbf16ps (and the tiles of AMX) want them; missing outputs and an odd last input are zeros. A panel is read from
// front to back, so that a product of few rows streams the weight once, at the speed of memory.
//
// A weight [N, K] of int8 has a float32 scale per output: panels [N / 32][K / 4][32][4], four neighbouring inputs in a
// word. Half the bytes of bf16, which is what few rows cost. INT8: each row is rounded to int8 as it is packed, with a
// scale of its own (its largest magnitude / 127), and sums are exact integers: a row's bits depend on nothing else.
// Weights are held with 128 added, as instructions want them that multiply unsigned numbers with signed ones, and 128
// times the sum of the row is taken off. INT8_WEIGHT: rows stay bf16.
//
// A weight in blocks (Q4_0 and so on) is held in the bytes in which the checkpoint stores it (tile/blocks.h). The
// number in `Packed` says which, so gates and ups may be of another kind of block than the way down.
//
// Each result is one chain of additions over K in a fixed order, whatever other rows and columns there are: a row's
// bits never depend on its company. Many rows may go to another library's product instead (`Brgemm`), which is for CPUs
// with AMX, and promises no such thing.
#pragma once

#include "kernels/scratch.h"
#include "kernels/target.h"
#include "simd/simd.h"
#include "tile/tile.h"

namespace narrows::NARROWS_TARGET {

// Calls `work(Weight{})` for a kind of weight by its number.
template <typename Work>
inline void with_kind(int kind, Work work) {
    if (kind == INT8) return work(Int8{});
    if (kind == INT8_WEIGHT) return work(WeightInt8{});
    if (kind >= Q4_0) return work(InBlocks{});
    work(Bf16{});
}

// silu(gate) * up in float32.
inline F32x16 silu_mul(F32x16 gate, F32x16 up) { return gate / (set(1.0f) + exp(zero() - gate)) * up; }

}  // namespace narrows::NARROWS_TARGET
