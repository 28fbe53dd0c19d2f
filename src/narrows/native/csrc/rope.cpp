// Rotary embedding of queries and keys together with the write of a step's slots: one pass over each row.
//
// Numbers are rounded where the reference rounds them: with a table in the rows' dtype after each product and after the
// sum, with a float32 table once, at the end. A norm before the rotation (Qwen3) rounds after the division and after
// the weight.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "tape.h"
#include "vector.h"

// 1 where these functions are compiled for this CPU.
NARROWS_EXPORT int narrows_rope() {
#ifdef NARROWS_VECTORS
    return 1;
#else
    return 0;
#endif
}

#ifdef NARROWS_VECTORS
namespace {

template <typename T>
inline __m512 rounded(__m512 x) {
    if constexpr (sizeof(T) == 4) return x;
    return widen(narrow(x));
}

// Pairs of neighbours: sixteen first members and sixteen second ones.
inline void neighbours(const bf16* x, __m512& first, __m512& second) {
    const __m512i pairs = _mm512_loadu_si512(x);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
}

inline void neighbours(const float* x, __m512& first, __m512& second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    first = _mm512_permutex2var_ps(low, even, high);
    second = _mm512_permutex2var_ps(low, odd, high);
}

// A product rounded to float32, which the compiler may not fuse with the sum behind it.
inline __m512 product(__m512 a, __m512 b) {
    return _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

constexpr int64_t MOST = 512;  // most pairs of a head

// One head's `half` pairs rotated, in halves; `to` may be `x`.
template <typename T, typename Table>
void rotate(T* to, const T* x, const Table* cos, const Table* sin, int64_t half, bool interleaved) {
    T straight[2 * MOST];
    if (interleaved) {
        int64_t i = 0;
        for (; i + 16 <= half; i += 16) {
            __m512 a, b;
            neighbours(x + 2 * i, a, b);
            store16(straight + i, a);
            store16(straight + half + i, b);
        }
        for (; i < half; ++i) straight[i] = x[2 * i], straight[half + i] = x[2 * i + 1];
        x = straight;
    }
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 mask = first_lanes(half - i);
        const __m512 a = load16(x + i, mask), b = load16(x + half + i, mask);
        const __m512 c = load16(cos + i, mask), s = load16(sin + i, mask);
        __m512 first, second;
        if constexpr (sizeof(Table) == 2) {
            first = _mm512_sub_ps(rounded<bf16>(_mm512_mul_ps(a, c)), rounded<bf16>(_mm512_mul_ps(b, s)));
            second = _mm512_add_ps(rounded<bf16>(_mm512_mul_ps(b, c)), rounded<bf16>(_mm512_mul_ps(a, s)));
        } else {
            first = _mm512_sub_ps(product(a, c), product(b, s));
            second = _mm512_add_ps(product(b, c), product(a, s));
        }
        store16(to + i, first, mask);
        store16(to + half + i, second, mask);
    }
}

// `weight * round(x / sqrt(mean(x^2) + eps))` of one head's columns.
template <typename T>
void norm(T* to, const T* x, const T* weight, int64_t num_columns, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_columns; i += 16) {
        const __m512 a = load16(x + i, first_lanes(num_columns - i));
        squares = _mm512_fmadd_ps(a, a, squares);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(num_columns) + eps);
    for (int64_t i = 0; i < num_columns; i += 16) {
        const __mmask16 mask = first_lanes(num_columns - i);
        const __m512 y = rounded<T>(_mm512_mul_ps(load16(x + i, mask), _mm512_set1_ps(inverse)));
        store16(to + i, _mm512_mul_ps(y, load16(weight + i, mask)), mask);
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
void rope(T* out, int64_t out_row, int64_t out_head, const T* x, int64_t x_row, int64_t x_head, const Table* cos,
          const Table* sin, int64_t num_rows, int64_t num_heads, int64_t half, bool interleaved, int num_threads) {
    for_rows(num_rows, num_threads, [&](int64_t t) {
        for (int64_t h = 0; h < num_heads; ++h) {
            rotate(out + t * out_row + h * out_head, x + t * x_row + h * x_head, cos + t * half, sin + t * half, half,
                   interleaved);
        }
    });
}

template <typename T, typename Table>
void rope_latents(T* q_pe, int64_t q_row, int64_t q_head, const T* latents, int64_t latent_row, const Table* cos,
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
void rope_heads(T* qkv, int64_t row, const T* q_norm, const T* k_norm, float eps, const Table* cos, const Table* sin,
                T* keys, T* values, const int64_t* slots, int64_t num_rows, int64_t num_q, int64_t num_kv, int64_t dim,
                int num_threads) {
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
NARROWS_EXPORT void narrows_rope_rows(void* out, int64_t out_row, int64_t out_head, const void* x, int64_t x_row,
                                      int64_t x_head, const void* cos, const void* sin, int64_t num_rows,
                                      int64_t num_heads, int64_t half, int interleaved, int is_float,
                                      int table_is_float, int num_threads) {
    NARROWS_TAPED(narrows_rope_rows(out, out_row, out_head, x, x_row, x_head, cos, sin, num_rows, num_heads,
                                    half, interleaved, is_float, table_is_float, num_threads));
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rope(static_cast<T*>(out), out_row, out_head, static_cast<const T*>(x), x_row, x_head,
             static_cast<const Table*>(cos), static_cast<const Table*>(sin), num_rows, num_heads, half,
             interleaved != 0, num_threads);
    });
}

// Latent attention: q_pe [num_rows, num_heads, 2 half] rotated in place, and each row's latent (`rank` columns) and its
// rotated key (the columns behind) written to its slot.
NARROWS_EXPORT void narrows_rope_latents(void* q_pe, int64_t q_row, int64_t q_head, const void* latents,
                                         int64_t latent_row, const void* cos, const void* sin, void* cache,
                                         int64_t slot_stride, const int64_t* slots, int64_t num_rows,
                                         int64_t num_heads, int64_t rank, int64_t half, int is_float,
                                         int table_is_float, int num_threads) {
    NARROWS_TAPED(narrows_rope_latents(q_pe, q_row, q_head, latents, latent_row, cos, sin, cache, slot_stride,
                                       slots, num_rows, num_heads, rank, half, is_float, table_is_float,
                                       num_threads));
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rope_latents(static_cast<T*>(q_pe), q_row, q_head, static_cast<const T*>(latents), latent_row,
                     static_cast<const Table*>(cos), static_cast<const Table*>(sin), static_cast<T*>(cache), slot_stride,
                     slots, num_rows, num_heads, rank, half, num_threads);
    });
}

// Grouped-query attention: of qkv [num_rows, num_q + 2 num_kv, dim] the query heads normed (where a weight is given)
// and rotated in place, the key heads likewise into their slots [slot, num_kv, dim], the value heads copied to theirs.
NARROWS_EXPORT void narrows_rope_heads(void* qkv, int64_t row, const void* q_norm, const void* k_norm, float eps,
                                       const void* cos, const void* sin, void* keys, void* values, const int64_t* slots,
                                       int64_t num_rows, int64_t num_q, int64_t num_kv, int64_t dim, int is_float,
                                       int table_is_float, int num_threads) {
    NARROWS_TAPED(narrows_rope_heads(qkv, row, q_norm, k_norm, eps, cos, sin, keys, values, slots, num_rows,
                                     num_q, num_kv, dim, is_float, table_is_float, num_threads));
    typed(is_float, table_is_float, [&]<typename T, typename Table>(T*, Table*) {
        rope_heads(static_cast<T*>(qkv), row, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), eps,
                   static_cast<const Table*>(cos), static_cast<const Table*>(sin), static_cast<T*>(keys),
                   static_cast<T*>(values), slots, num_rows, num_q, num_kv, dim, num_threads);
    });
}
#endif
