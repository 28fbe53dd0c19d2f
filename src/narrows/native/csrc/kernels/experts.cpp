// The routed experts of one rank as one grouped product: rows sorted by expert, gate and up with their activation, then
// down, added up per row by rising expert in float32 and rounded once. products.h has the products.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels/products.h"

namespace narrows::NARROWS_TARGET {
namespace {

struct Weights {
    Packed gate_up, down;
    int64_t num_inner;
};

// Some rows of one expert: places [start, start + count) of the list of (row, weight) sorted by expert.
struct Piece {
    int64_t start, count;
    Weights expert;
};

struct Places {
    std::vector<int64_t> row;
    std::vector<float> weight;
    std::vector<Piece> pieces;
    std::vector<int64_t> groups;  // pieces [groups[i], groups[i + 1]) are worked on together

    void sort(const void* ids, int wide_ids, const float* weights, int64_t num_rows, int64_t top_k,
              int64_t first_expert, int64_t num_experts, std::vector<int64_t>& ends) {
        const auto expert_of = [&](int64_t pair) {
            return (wide_ids ? static_cast<const int64_t*>(ids)[pair] : static_cast<const int32_t*>(ids)[pair]) -
                   first_expert;
        };
        ends.assign(num_experts + 1, 0);
        for (int64_t pair = 0; pair < num_rows * top_k; ++pair) {
            const int64_t e = expert_of(pair);
            if (e >= 0 && e < num_experts) ++ends[e + 1];
        }
        for (int64_t e = 0; e < num_experts; ++e) ends[e + 1] += ends[e];
        row.resize(ends[num_experts]);
        weight.resize(ends[num_experts]);
        for (int64_t pair = 0; pair < num_rows * top_k; ++pair) {
            const int64_t e = expert_of(pair);
            if (e < 0 || e >= num_experts) continue;
            row[ends[e]] = pair / top_k;
            weight[ends[e]++] = weights[pair];  // leaves in ends[e] where expert e ends
        }
    }

    void cut(int64_t start, int64_t stop, const Weights& expert, int64_t most_rows) {
        for (; start < stop; start += most_rows) pieces.push_back({start, std::min(most_rows, stop - start), expert});
    }

    // Returns the most places of a group.
    int64_t group(int64_t most_rows) {
        groups.assign(1, 0);
        int64_t places = 0, most = 0;
        for (int64_t i = 0; i < int64_t(pieces.size()); ++i) {
            if (places > 0 && places + pieces[i].count > most_rows) {
                groups.push_back(i);
                places = 0;
            }
            most = std::max(most, places += pieces[i].count);
        }
        groups.push_back(pieces.size());
        return most;
    }
};

// Packs rows of the pieces of a group, block by block in turns: `row_of` gives the address of a place's row, `width_of`
// how many inputs a piece's rows have; `stride` is the room for each row, in words.
template <typename Kind, typename RowOf, typename WidthOf>
void pack_group(uint32_t* packed, int64_t stride, const Piece* begin, const Piece* end, int thread, int threads,
                const Brgemm* brgemm, RowOf row_of, WidthOf width_of) {
    int64_t turn = 0;
    for (const Piece* piece = begin; piece < end; ++piece) {
        const Blocks blocks(piece->count, Kind::MOST_ROWS);
        uint32_t* to = packed + (piece->start - begin->start) * stride;
        for (int64_t b = 0; b < blocks.count; ++b) {
            if (turn++ % threads != thread) continue;
            const int64_t first = blocks.start(b);
            Kind::pack(
                to + first * Kind::row_words(width_of(*piece)),
                [&](int64_t r) { return row_of(piece->start + first + r); }, blocks.start(b + 1) - first,
                width_of(*piece), brgemm != nullptr && piece->count >= MANY);
        }
    }
}

// The products of a group: each thread takes its share of the panels of every piece, the same share each time, so that
// what it adds to is its own. `store(piece, panel, place, low, high)`.
template <typename Kind, typename PanelsOf, typename WidthOf, typename Store>
void multiply_group(const uint32_t* packed, int64_t stride, const Piece* begin, const Piece* end, int thread,
                    int threads, const Brgemm* brgemm, PanelsOf panels_of_piece, WidthOf width_of, Store store) {
    for (const Piece* piece = begin; piece < end; ++piece) {
        const Blocks blocks(piece->count, Kind::MOST_ROWS);
        const auto [weight, count] = panels_of_piece(*piece);
        for (int64_t p = thread * count / threads; p < (thread + 1) * count / threads; ++p) {
            Kind::product(packed + (piece->start - begin->start) * stride, blocks, 0, blocks.count, weight, p,
                          width_of(*piece), piece->count >= MANY ? brgemm : nullptr,
                          [&](int64_t r, F32x16 low, F32x16 high) { store(*piece, p, piece->start + r, low, high); });
        }
    }
}

template <typename Out>
void round_rows(Out* out, int64_t stride, const float* sums, int64_t width, int64_t first, int64_t stop) {
    for (int64_t t = first; t < stop; ++t) {
        for (int64_t h = 0; h < width; h += 16) {
            const Lanes here = first_lanes(width - h);
            store(out + t * stride + h, load(sums + t * width + h, here), here);
        }
    }
}

// The weights of several experts, one after the other.
struct Stack {
    Packed first;
    int64_t num_outputs, num_inputs;

    template <typename Kind>
    Packed of(int64_t expert) const {
        const int64_t panels = expert * panels_of(num_outputs);
        Packed at = first;
        at.panels += panels * Kind::panel_size(first, num_inputs);
        if (at.scales != nullptr) at.scales += panels * PANEL;
        return at;
    }
};

template <typename Kind>
void run_experts(void* out, int64_t out_stride, int wide, const bf16* x, int64_t x_stride, const void* ids,
                 int wide_ids, const float* weights, int64_t num_rows, int64_t top_k, const Stack& gate_up,
                 const Stack& down, int64_t first_expert, int64_t num_experts, const Weights& shared, int num_threads,
                 const Brgemm* brgemm) {
    const int64_t num_inputs = gate_up.num_inputs, num_inner = down.num_inputs, shared_inner = shared.num_inner;
    static thread_local Places kept_places;
    static thread_local std::vector<int64_t> kept_ends;
    static thread_local Scratch for_rows, for_inner, for_inner_rows, for_sums;
    Places& places = kept_places;  // a thread_local name means another object in each thread of a team
    places.sort(ids, wide_ids, weights, num_rows, top_k, first_expert, num_experts, kept_ends);
    const int64_t row_words = Kind::row_words(num_inputs), widest = std::max(num_inner, shared_inner);
    const int64_t most_rows = std::max(Kind::MOST_ROWS, CHUNK / (row_words * 4) / Kind::MOST_ROWS * Kind::MOST_ROWS);
    places.pieces.clear();
    for (int64_t e = 0; e < num_experts; ++e) {
        const Weights expert{gate_up.of<Kind>(e), down.of<Kind>(e), num_inner};
        places.cut(e ? kept_ends[e - 1] : 0, kept_ends[e], expert, most_rows);
    }
    if (shared_inner) {
        const int64_t start = places.row.size();
        for (int64_t t = 0; t < num_rows; ++t) places.row.push_back(t), places.weight.push_back(1.0f);
        places.cut(start, start + num_rows, shared, most_rows);
    }
    const int64_t most = places.group(most_rows);
    const int64_t inner_words = Kind::row_words(widest), panel_columns = PANEL / 2;
    uint32_t* packed = for_rows.of<uint32_t>(most * row_words);
    bf16* inner = for_inner.of<bf16>(most * widest);
    uint32_t* packed_inner = for_inner_rows.of<uint32_t>(most * inner_words);
    const bool in_place = wide && out_stride == num_inputs;
    float* sums = in_place ? static_cast<float*>(out) : for_sums.of<float>(num_rows * num_inputs);
    const auto inputs_of = [&](const Piece&) { return num_inputs; };
    const auto inner_of = [&](const Piece& piece) { return piece.expert.num_inner; };

    const auto work = [&](int thread, int threads, auto barrier) {
        const int64_t row = thread * num_rows / threads, stop_row = (thread + 1) * num_rows / threads;
        std::fill(sums + row * num_inputs, sums + stop_row * num_inputs, 0.0f);
        for (int64_t g = 0; g + 1 < int64_t(places.groups.size()); ++g) {
            const Piece *begin = places.pieces.data() + places.groups[g],
                        *end = places.pieces.data() + places.groups[g + 1];
            if (begin == end) continue;
            const int64_t base = begin->start;
            pack_group<Kind>(
                packed, row_words, begin, end, thread, threads, brgemm,
                [&](int64_t place) { return x + places.row[place] * x_stride; }, inputs_of);
            barrier();
            multiply_group<Kind>(
                packed, row_words, begin, end, thread, threads, brgemm,
                [&](const Piece& piece) {
                    return std::pair(piece.expert.gate_up, panels_of(2 * piece.expert.num_inner));
                },
                inputs_of,
                [&](const Piece& piece, int64_t panel, int64_t place, F32x16 gate, F32x16 up) {
                    const int64_t column = panel * panel_columns;
                    store(inner + (place - base) * widest + column, silu_mul(gate, up),
                          first_lanes(piece.expert.num_inner - column));
                });
            barrier();
            pack_group<Kind>(
                packed_inner, inner_words, begin, end, thread, threads, brgemm,
                [&](int64_t place) { return inner + (place - base) * widest; }, inner_of);
            barrier();
            multiply_group<Kind>(
                packed_inner, inner_words, begin, end, thread, threads, brgemm,
                [&](const Piece& piece) { return std::pair(piece.expert.down, panels_of(num_inputs)); }, inner_of,
                [&](const Piece&, int64_t panel, int64_t place, F32x16 low, F32x16 high) {
                    const int64_t left = num_inputs - panel * PANEL;
                    const Lanes here = first_lanes(left), next = first_lanes(left - 16);
                    const F32x16 weight = set(places.weight[place]);
                    float* to = sums + places.row[place] * num_inputs + panel * PANEL;
                    // The next panel's part of this row: rows lie here and there, for no CPU to foresee.
                    fetch_far(to + PANEL);
                    fetch_far(to + PANEL + PANEL / 2);
                    store(to, mul_add(weight, low, load(to, here)), here);
                    store(to + 16, mul_add(weight, high, load(to + 16, next)), next);
                });
        }
        if (brgemm != nullptr) brgemm->release(true);
        barrier();
        if (in_place) return;
        if (wide) {
            round_rows(static_cast<float*>(out), out_stride, sums, num_inputs, row, stop_row);
        } else {
            round_rows(static_cast<bf16*>(out), out_stride, sums, num_inputs, row, stop_row);
        }
    };
    if (num_threads <= 1) {
        work(0, 1, [] {});
        return;
    }
#pragma omp parallel num_threads(num_threads)
    work(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
}

}  // namespace

// out[t] = sum over the chosen experts held here of weight * down(silu(gate x[t]) * up x[t]), by rising expert in
// float32, and, where `shared_inner` is not 0, the shared expert's MLP added last; rounded once.
//
// ids [num_rows, top_k], int32, or int64 where `wide_ids`; others than first_expert <= id < first_expert + num_experts
// add nothing. gate_up and down: the experts' packed weights one after the other, scales too (`kind`:
// products.h). out: bf16, float32 where `wide`.
void experts(void* out, int64_t out_stride, int wide, const bf16* x, int64_t x_stride, const void* ids, int wide_ids,
             const float* weights, int64_t num_rows, int64_t top_k, int kind, const Packed* gate_up, const Packed* down,
             int64_t first_expert, int64_t num_experts, int64_t num_inputs, int64_t num_inner,
             const Packed* shared_gate_up, const Packed* shared_down, int64_t shared_inner, int num_threads,
             const Brgemm* brgemm) {
    if (num_rows == 0) return;
    if (kind != BF16_WEIGHT || !TAKES_BRGEMM) brgemm = nullptr;
    Weights shared{{}, {}, 0};
    if (shared_inner) shared = {*shared_gate_up, *shared_down, shared_inner};
    with_kind(kind, [&]<typename Kind>(Kind) {
        run_experts<Kind>(out, out_stride, wide, x, x_stride, ids, wide_ids, weights, num_rows, top_k,
                          {*gate_up, 2 * num_inner, num_inputs}, {*down, num_inputs, num_inner}, first_expert,
                          num_experts, shared, num_threads, brgemm);
    });
}

}  // namespace narrows::NARROWS_TARGET
