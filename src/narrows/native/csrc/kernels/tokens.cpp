// From token ids to rows, and from logits to token ids.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/each_row.h"
#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

// The first largest of a row; a NaN is larger than all.
template <typename T>
int64_t argmax_row(const T* x, int64_t width) {
    const F32x16 none = set(-std::numeric_limits<float>::infinity());
    F32x16 most = none;
    for (int64_t v = 0; v < width; v += 16) {
        const Lanes here = first_lanes(width - v);
        const F32x16 y = select(here, load(x + v, here), none);
        const uint32_t nan = nan_lanes(y);
        if (nan) return v + __builtin_ctz(nan);
        most = max(most, y);
    }
    const F32x16 value = set(reduce_max(most));
    for (int64_t v = 0; v < width; v += 16) {
        const Lanes here = first_lanes(width - v);
        const uint32_t equal = equal_lanes(select(here, load(x + v, here), none), value);
        if (equal) return v + __builtin_ctz(equal);
    }
    return 0;
}

template <typename T>
void argmax_rows(double* out, const T* x, int64_t stride, int64_t num_rows, int64_t width, int64_t first_id,
                 int num_threads) {
    for_rows(num_rows, width, num_threads, [&](int64_t t) {
        const int64_t at = argmax_row(x + t * stride, width);
        out[2 * t] = to_float(x[t * stride + at]);
        out[2 * t + 1] = double(first_id + at);
    });
}

}  // namespace

// out[t] = table[id - first_id], or zeros for an id outside first_id <= id < first_id + num_ids; rows of `row_bytes`.
void embedding(char* out, int64_t out_stride_bytes, const int64_t* ids, int64_t num_rows, const char* table,
               int64_t first_id, int64_t num_ids, int64_t row_bytes) {
    for (int64_t t = 0; t < num_rows; ++t) {
        const int64_t at = ids[t] - first_id;
        if (at >= 0 && at < num_ids) {
            std::memcpy(out + t * out_stride_bytes, table + at * row_bytes, row_bytes);
        } else {
            std::memset(out + t * out_stride_bytes, 0, row_bytes);
        }
    }
}

// out[t] = (largest of x[t], first_id + its column), the lowest column of several; width at least 1.
void argmax(double* out, const void* x, int64_t stride, int64_t num_rows, int64_t width, int64_t first_id, int wide,
            int num_threads) {
    with_type(wide, [&]<typename T>(T*) {
        argmax_rows(out, static_cast<const T*>(x), stride, num_rows, width, first_id, num_threads);
    });
}

// out[t] = the id of the largest of `num_pairs` (value, id), a NaN larger than all, ties to the lower id.
void pick(int64_t* out, const double* pairs, int64_t stride, int64_t num_rows, int64_t num_pairs) {
    for (int64_t t = 0; t < num_rows; ++t) {
        const double* row = pairs + t * stride;
        double value = row[0], id = row[1];
        for (int64_t i = 1; i < num_pairs; ++i) {
            const double other = row[2 * i], its = row[2 * i + 1];
            const bool nan = std::isnan(value), larger = !nan && (std::isnan(other) || other > value);
            const bool equal = nan ? std::isnan(other) : other == value;
            if (larger || (equal && its < id)) value = other, id = its;
        }
        out[t] = int64_t(id);
    }
}

}  // namespace narrows::NARROWS_TARGET
