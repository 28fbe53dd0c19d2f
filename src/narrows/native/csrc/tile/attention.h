// The tiles of attention, by what the target has for them.
//
// Keys are held as panels of 32 tokens: [D / 2][32][2] bf16, two neighbouring columns side by side; values as panels of
// 32 columns: [tokens / 2][32][2], two neighbouring tokens side by side. Queries and probabilities are broadcast, a
// Word at a time. All sums are in float32, in one order for each result, whatever other rows and heads there are.
#pragma once

#include "tile/tile.h"

namespace narrows::NARROWS_TARGET {

template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void clear(F32x16 (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero();
    }
}

}  // namespace narrows::NARROWS_TARGET

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "tile/attention_avx512bf16.h"
#else
#include "tile/attention_widened.h"
#endif
