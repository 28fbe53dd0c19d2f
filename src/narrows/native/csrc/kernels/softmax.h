// One step of the online softmax, which both attention kernels take.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float NO_SCORE = -1e30f;  // below every score; finite, so that differences of it are numbers

// One row's softmax so far: the largest score and the sum of 2^(score - largest), scores in units of log 2.
struct Softmax {
    float largest = NO_SCORE, sum = 0.0f;
};

// Takes `seen` more scores into a row's softmax. Their probabilities (2^(score - largest), rounded to T) go to `p`,
// zeros behind them up to `padded`, a multiple of 16; returns what all earlier sums are to be multiplied by.
template <typename T>
inline float take_scores(Softmax& row, const float* scores, int64_t seen, int64_t padded, float scale_log2, T* p) {
    if (seen <= 0) {
        std::fill(p, p + std::max<int64_t>(0, padded), T(0));
        return 1.0f;
    }
    const F32x16 lowest = set(-INFINITY);
    F32x16 top = lowest;
    int64_t i = 0;
    for (; i + 16 <= seen; i += 16) top = max(top, load(scores + i));
    const bool more = i < seen;
    const Lanes rest = first_lanes(seen - i);
    if (more) top = max(top, select(rest, load(scores + i, rest), lowest));
    const float largest = std::max(row.largest, reduce_max(top) * scale_log2);
    const float shrink = first_lane(exp2(set(row.largest - largest)));
    const F32x16 scale = set(scale_log2), down = set(largest);
    F32x16 sum = zero();
    for (i = 0; i + 16 <= seen; i += 16) {
        const F32x16 e = exp2(mul_sub(load(scores + i), scale, down));
        sum = sum + e;
        store(p + i, e);
    }
    if (more) {
        const F32x16 e = keep(exp2(mul_sub(load(scores + i, rest), scale, down)), rest);
        sum = sum + e;
        store(p + i, e);
        i += 16;
    }
    for (; i < padded; i += 16) store(p + i, zero());
    row.sum = row.sum * shrink + reduce_sum(sum);
    row.largest = largest;
    return shrink;
}

}  // namespace narrows::NARROWS_TARGET
