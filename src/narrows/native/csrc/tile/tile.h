// The products of a block of rows with a panel, by what the target has for it.
//
// A kind of weight (Bf16, Int8, WeightInt8, InBlocks) says how many words of 4 bytes a packed row has (`row_words`),
// and a panel of a weight (`panel_size`), how many rows make a block (`MOST_ROWS`), how they are packed (`pack`), and
// how blocks of them are multiplied with a panel (`product`). TAKES_BRGEMM: whether another library's product reads
// what `pack` leaves.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "tile/avx512bf16.h"
#else
#include "tile/widened.h"
#endif
#include "tile/blocks.h"
