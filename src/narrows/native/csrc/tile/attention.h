// The tiles of attention, by what the target has for them.
//
// Keys are held as panels of 32 tokens: [D / 2][32][2] bf16, two neighbouring columns side by side; values as panels of
// 32 columns: [tokens / 2][32][2], two neighbouring tokens side by side. Queries and probabilities are broadcast, a
// Word at a time. All sums are in float32, in one order for each result, whatever other rows and heads there are.
#pragma once

#include "tile/tile.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "tile/attention_avx512bf16.h"
#else
#include "tile/attention_widened.h"
#endif
