// What kernels that go through rows one by one share.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace narrows::NARROWS_TARGET {

// `row(t)` for every row, on up to `num_threads` threads; `work` is roughly how many numbers a row has to go through.
template <typename Row>
void for_rows(int64_t num_rows, int64_t work, int num_threads, Row row) {
    constexpr int64_t WORTH_A_TEAM = 1 << 16;
    if (num_threads <= 1 || num_rows * work < WORTH_A_TEAM) {
        for (int64_t t = 0; t < num_rows; ++t) row(t);
        return;
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t t = 0; t < num_rows; ++t) row(t);
}

// Calls `work(pointer)` with a pointer of the type that `wide` names: float32, else bf16.
template <typename Work>
inline void with_type(int wide, Work work) {
    if (wide) return work(static_cast<float*>(nullptr));
    work(static_cast<bf16*>(nullptr));
}

}  // namespace narrows::NARROWS_TARGET
