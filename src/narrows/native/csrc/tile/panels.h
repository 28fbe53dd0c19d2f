// What is the same for the tiles of all targets: the panels that weights are held as, and how rows are cut into blocks.
#pragma once

#include <cstdint>

#include "kernels/target.h"

namespace narrows::NARROWS_TARGET {

constexpr int64_t PANEL = 32;         // outputs of a panel
constexpr int64_t CHUNK = 384 << 10;  // bytes of packed rows that are worked on together; they stay in the L2 cache
constexpr int64_t MANY = 16;          // rows from which on another library's tiles of 16 rows are worth it

inline int64_t pairs_of(int64_t num_inputs) { return (num_inputs + 1) / 2; }
inline int64_t quads_of(int64_t num_inputs) { return (num_inputs + 3) / 4; }
inline int64_t panels_of(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

// How rows are cut into blocks of nearly equal height: block i is rows [start(i), start(i + 1)).
struct Blocks {
    int64_t num_rows, count;
    Blocks(int64_t rows, int64_t most) : num_rows(rows), count((rows + most - 1) / most) {}
    int64_t start(int64_t i) const { return i * num_rows / count; }
};

// Calls `work.operator()<rows>()`.
template <int MOST, typename Work>
[[gnu::always_inline]] inline void with_rows(int64_t rows, Work work) {
    if (rows == MOST) return work.template operator()<MOST>();
    if constexpr (MOST > 1) with_rows<MOST - 1>(rows, work);
}

}  // namespace narrows::NARROWS_TARGET
