// Rotary embedding of queries and keys together with the write of a step's slots: one pass over each row.
//
// Numbers are rounded where the reference rounds them: with a table in the rows' dtype after each product and after the
// sum, with a float32 table once, at the end. A norm before the rotation (Qwen3) rounds after the division and after
// the weight.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/target.h"
#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {
namespace {

constexpr int64_t MOST = 512;  // most pairs of a head

// One head's `half` pairs rotated, in halves; `to` may be `x`.
template <typename T, typename Table>
void rotate(T* to, const T* x, const Table* cos, const Table* sin, int64_t half, bool interleaved) {
    T straight[2 * MOST];
    if (interleaved) {
        int64_t i = 0;
        for (; i + 16 <= half; i += 16) {
            F32x16 a, b;
            load_pairs(x + 2 * i, a, b);
            store(straight + i, a);
            store(straight + half + i, b);
        }
        for (; i < half; ++i) straight[i] = x[2 * i], straight[half + i] = x[2 * i + 1];
        x = straight;
    }
    for (int64_t i = 0; i < half; i += 16) {
        const Lanes mask = first_lanes(half - i);
        const F32x16 a = load(x + i, mask), b = load(x + half + i, mask);
        const F32x16 c = load(cos + i, mask), s = load(sin + i, mask);
        F32x16 first, second;
        if constexpr (sizeof(Table) == 2) {
            first = as_bf16(a * c) - as_bf16(b * s);
            second = as_bf16(b * c) + as_bf16(a * s);
        } else {
            first = a * c - b * s;
            second = b * c + a * s;
        }
        store(to + i, first, mask);
        store(to + half + i, second, mask);
    }
}

// `weight * round(x / sqrt(mean(x^2) + eps))` of one head's columns.
template <typename T>
void norm(T* to, const T* x, const T* weight, int64_t num_columns, float eps) {
    F32x16 squares = zero();
    for (int64_t i = 0; i < num_columns; i += 16) {
        const F32x16 a = load(x + i, first_lanes(num_columns - i));
        squares = mul_add(a, a, squares);
    }
    const float inverse = 1.0f / std::sqrt(reduce_sum(squares) / float(num_columns) + eps);
    for (int64_t i = 0; i < num_columns; i += 16) {
        const Lanes mask = first_lanes(num_columns - i);
        const F32x16 y = stored_as<T>(load(x + i, mask) * set(inverse));
        store(to + i, y * load(weight + i, mask), mask);
    }
}

template <typename Row>
void for_rows(int64_t num_rows, int num_threads, Row row) {
    if (num_threads <= 1 || num_rows < 2 * num_threads) {
        for (int64_t t = 0; t < num_rows; ++t) row(t);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t t = 0; t < num_rows; ++t) row(t);
}

template <typename T, typename Table>
void rotate_rows(T* out, int64_t out_row, int64_t out_head, const T* x, int64_t x_row, int64_t x_head, const Table* cos,
                 const Table* sin, int64_t num_rows, int64_t num_heads, int64_t half, bool interleaved,
                 int num_threads) {
    for_rows(num_rows, num_threads, [&](int64_t t) {
        for (int64_t h = 0; h < num_heads; ++h) {
            rotate(out + t * out_row + h * out_head, x + t * x_row + h * x_head, cos + t * half, sin + t * half, half,
                   interleaved);
        }
    });
}

template <typename T, typename Table>
void rotate_latents(T* q_pe, int64_t q_row, int64_t q_head, const T* latents, int64_t latent_row, const Table* cos,
                    const Table* sin, T* cache, int64_t slot_stride, const int64_t* slots, int64_t num_rows,
                    int64_t num_heads, int64_t rank, int64_t half, int num_threads) {
    for_rows(num_rows, num_threads, [&](int64_t t) {
        const Table *c = cos + t * half, *s = sin + t * half;
        for (int64_t h = 0; h < num_heads; ++h) {
            T* q = q_pe + t * q_row + h * q_head;
            rotate(q, q, c, s, half, true);
        }
        T* slot = cache + slots[t] * slot_stride;
        std::memcpy(slot, latents + t * latent_row, rank * sizeof(T));
        rotate(slot + rank, latents + t * latent_row + rank, c, s, half, true);
    });
}

template <typename T, typename Table>
void rotate_heads(T* qkv, int64_t row, const T* q_norm, const T* k_norm, float eps, const Table* cos, const Table* sin,
                  T* keys, T* values, const int64_t* slots, int64_t num_rows, int64_t num_q, int64_t num_kv,
                  int64_t dim, int num_threads) {
    const int64_t half = dim / 2;
    for_rows(num_rows, num_threads, [&](int64_t t) {
        T* x = qkv + t * row;
        for (int64_t h = 0; h < num_q + num_kv; ++h) {
            T* head = x + h * dim;
            const T* weight = h < num_q ? q_norm : k_norm;
            if (weight != nullptr) norm(head, head, weight, dim, eps);
            T* to = h < num_q ? head : keys + (slots[t] * num_kv + h - num_q) * dim;
            rotate(to, head, cos + t * half, sin + t * half, half, false);
        }
        std::memcpy(values + slots[t] * num_kv * dim, x + (num_q + num_kv) * dim, num_kv * dim * sizeof(T));
    });
}

// Calls `function(x, table)` with pointers of the types that the two flags name.
template <typename Function>
void typed(int is_float, int table_is_float, Function function) {
    if (is_float) return function(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    if (table_is_float) return function(static_cast<bf16*>(nullptr), static_cast<float*>(nullptr));
    function(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
}

}  // namespace

// Rotates x [num_rows, num_heads, 2 half] into `out`, which may be x; pairs of neighbours (`interleaved`) or halves
// come, halves go. Types: x float32 or bf16; the table is float32 or, with bf16 rows, bf16. Strides count numbers.
void rope_rows(void* out, int64_t out_row, int64_t out_head, const void* x, int64_t x_row, int64_t x_head,
               const void* cos, const void* sin, int64_t num_rows, int64_t num_heads, int64_t half, int interleaved,
               int is_float, int table_is_float, int num_threads) {
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rotate_rows(static_cast<T*>(out), out_row, out_head, static_cast<const T*>(x), x_row, x_head,
                    static_cast<const Table*>(cos), static_cast<const Table*>(sin), num_rows, num_heads, half,
                    interleaved != 0, num_threads);
    });
}

// Latent attention: q_pe [num_rows, num_heads, 2 half] rotated in place, and each row's latent (`rank` columns) and its
// rotated key (the columns behind) written to its slot.
void rope_latents(void* q_pe, int64_t q_row, int64_t q_head, const void* latents, int64_t latent_row, const void* cos,
                  const void* sin, void* cache, int64_t slot_stride, const int64_t* slots, int64_t num_rows,
                  int64_t num_heads, int64_t rank, int64_t half, int is_float, int table_is_float, int num_threads) {
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rotate_latents(static_cast<T*>(q_pe), q_row, q_head, static_cast<const T*>(latents), latent_row,
                       static_cast<const Table*>(cos), static_cast<const Table*>(sin), static_cast<T*>(cache),
                       slot_stride, slots, num_rows, num_heads, rank, half, num_threads);
    });
}

// Grouped-query attention: of qkv [num_rows, num_q + 2 num_kv, dim] the query heads normed (where a weight is given)
// and rotated in place, the key heads likewise into their slots [slot, num_kv, dim], the value heads copied to theirs.
void rope_heads(void* qkv, int64_t row, const void* q_norm, const void* k_norm, float eps, const void* cos,
                const void* sin, void* keys, void* values, const int64_t* slots, int64_t num_rows, int64_t num_q,
                int64_t num_kv, int64_t dim, int is_float, int table_is_float, int num_threads) {
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rotate_heads(static_cast<T*>(qkv), row, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), eps,
                     static_cast<const Table*>(cos), static_cast<const Table*>(sin), static_cast<T*>(keys),
                     static_cast<T*>(values), slots, num_rows, num_q, num_kv, dim, num_threads);
    });
}

}  // namespace narrows::NARROWS_TARGET
