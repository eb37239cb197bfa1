// Drawing one token a row. Grid: (blocks_per_row, batch); the blocks of a row form a cluster and take equal slices of
// it.
//
// A greedy row is one pass over the logits. Any other row: a pass for the greatest logit (if it filters), one or more
// for the cutoff of top-k and of top-p, and one that draws. Rows choose for themselves; kMode only leaves code out. If
// the greatest score is not finite (NaN or infinite logits, a row of -inf) no filter applies: the first NaN is drawn,
// else the first +inf, else token 0. Never an id outside of the row.
#pragma once
#include "sampling/cutoff.cuh"
#include "sampling/draw.cuh"

namespace sampling {

// One row's rules, for its blocks to keep in shared memory. Ids and positions in the generator's counter are 32-bit
// words.
struct Rules {
    float temperature, top_p, min_p;
    int top_k;  // 0: no limit
    Noise noise;

    __device__ static Rules load(const Params& p, int row, int position) {
        const int64_t top_k = p.top_k[row], seed = p.seed[row];
        return {p.temperature[row],
                p.top_p[row],
                p.min_p[row],
                top_k > 0 && top_k < p.vocab_size ? static_cast<int>(top_k) : 0,
                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(position),
                 static_cast<uint32_t>(p.request[row]), static_cast<uint32_t>(p.sample[row])}};
    }
    __device__ bool filter() const { return top_k > 0 || top_p < 1.f || min_p > 0.f; }
};

struct Shared {
    BestOfRow greatest, drawn;
    Rules rules;
    CutoffMemory cutoff;  // last: only the filtering kernels have it
};

template <typename T>
__device__ __forceinline__ uint64_t greatest_of(const Slice<T>& slice) {
    float best = -kInfinity;
    uint32_t id = 0;
    slice.template for_each<4>([&](const Chunk<T>& chunk, int first) {
        const float greatest = chunk.max();
        if (greatest <= best || best != best) return;
        best = greatest;
        float x[kChunk];
        chunk.unpack(x);
#pragma unroll
        for (int i = kChunk - 1; i >= 0; --i) {
            if (x[i] == best || (best != best && x[i] != x[i])) id = first + i;
        }
    });
    return pack_candidate(ordered_for_max(best), id);
}

// Sets up the search for what top-k leaves.
template <typename T>
__device__ void begin_top_k(Search& search, const Rules& rules, float top) {
    constexpr float kReach = 12.f;  // nearly always holds the greatest k logits
    search.weight = {false, top, 0.f};
    search.floor = -kInfinity;
    search.start = at_or_below<T>(fmaxf(__fsub_rd(top, kReach), -1e38f));
    search.target = rules.top_k;
    search.begin<T>();
}

// The same for top-p, among the logits from `floor` on. `tied`: logits equal to `floor` that top-k left out, and whose
// probability therefore does not count.
template <typename T>
__device__ void begin_top_p(Search& search, const Rules& rules, float top, float floor, uint64_t tied, int vocab_size) {
    // All tokens further than this below the greatest have less than 1 - top_p of the mass, or none in the units that
    // Weight counts in. 6 keeps the mass of each below 2^23 of those.
    const float reach = fminf(fmaxf(logf(vocab_size / (1.f - rules.top_p)) + 0.1f, 6.f), 22.5f);
    const float start = at_or_below<T>(fmaxf(__fsub_rd(top, reach * rules.temperature), -1e38f));
    search.weight = {true, top, fminf(1.44269504f / rules.temperature, 1e37f)};
    search.floor = floor;
    search.start = fmaxf(start, floor);
    search.top_p = rules.top_p;
    search.excess = tied > 0 ? tied * search.weight.of(floor) : 0;
    search.begin<T>();
}

// The lowest logit that the row's filters leave, given its greatest; -inf if they leave all.
template <typename T>
__device__ __forceinline__ float threshold_of(Shared& shared, const RowGroup& group, const Slice<T>& slice, float top) {
    const Rules& rules = shared.rules;
    Search& search = shared.cutoff.search;
    float threshold = -kInfinity;
    uint64_t tied = 0;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
        if (filter == 0 ? rules.top_k == 0 : rules.top_p >= 1.f) continue;
        if (threadIdx.x == 0) {
            if (filter == 0) {
                begin_top_k<T>(search, rules, top);
            } else {
                begin_top_p<T>(search, rules, top, threshold, tied, slice.vocab_size);
            }
        }
        __syncthreads();
        shared.cutoff.run(group, slice);
        threshold = fmaxf(threshold, search.value);
        if (filter == 0) tied = search.value > -kInfinity ? search.above + search.at - rules.top_k : 0;
        __syncthreads();  // before thread 0 sets up the next
    }
    if (rules.min_p > 0.f) threshold = fmaxf(threshold, top + rules.temperature * logf(rules.min_p));
    return fminf(threshold, top);
}

// A stop id that may not be drawn yet becomes -inf, by the block whose slice holds it.
template <typename T>
__device__ void forbid_stops(const Params& p, const Slice<T>& slice, int row) {
    for (int i = threadIdx.x; i < p.num_stop_ids; i += kThreads) {
        const int64_t id = p.stop_ids[static_cast<int64_t>(row) * p.num_stop_ids + i];
        if (id >= int64_t{slice.begin} * kChunk && id < min(slice.end * kChunk, slice.vocab_size)) {
            slice.row[id] = static_cast<T>(-kInfinity);
        }
    }
    __syncthreads();
}

// Stores the token; a row whose token ended it, or was its last, goes idle. One warp.
__device__ inline void place(const Params& p, int row, int64_t token, int position) {
    const int lane = threadIdx.x;
    if (lane == 0) p.out[row] = token;
    if (p.token_ids == nullptr) return;
    bool stops = false;
    for (int i = lane; i < p.num_stop_ids; i += 32) {
        stops |= p.stop_ids[static_cast<int64_t>(row) * p.num_stop_ids + i] == token;
    }
    stops = __any_sync(kAllLanes, stops) && position >= p.first_stop_positions[row];
    if (lane == 0) {
        p.token_ids[row] = token;
        p.state_positions[row] = stops || position > p.last_positions[row] ? -1 : position;
    }
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 2) sample(const __grid_constant__ Params p) {
    constexpr bool kFilters = kMode == Mode::kFiltered;
    __shared__ __align__(16) unsigned char memory[kFilters ? sizeof(Shared) : offsetof(Shared, cutoff)];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const RowGroup group = RowGroup::here();
    const int row = blockIdx.y;
    if constexpr (kFilters) {
        shared.cutoff.histograms[0].clear();
        shared.cutoff.histograms[1].clear();
        if (threadIdx.x == 0) shared.cutoff.rounds = 0;
    }
    common::wait_for_previous_kernel();
    common::allow_next_kernel();

    int position = p.positions[row];
    if (p.token_ids != nullptr) {
        if (position < 0) {
            if (group.rank == 0 && threadIdx.x == 0) p.out[row] = 0;
            return;
        }
        ++position;
    }
    const Slice<T> slice = Slice<T>::of(p, row, group.rank);
    if (p.forbid_early_stops && position < p.first_stop_positions[row]) forbid_stops(p, slice, row);

    uint64_t best = 0;
    if constexpr (kMode == Mode::kGreedy) {
        best = shared.greatest.reduce(group, greatest_of(slice));
    } else {
        if (threadIdx.x == 0) shared.rules = Rules::load(p, row, position);
        __syncthreads();
        const Rules& rules = shared.rules;
        const bool greedy = rules.temperature == 0.f, filters = kFilters && rules.filter();
        if (greedy || filters) best = shared.greatest.reduce(group, greatest_of(slice));
        if (!greedy) {
            float threshold = -kInfinity;
            if constexpr (kFilters) {
                const float top = candidate_score(best);
                if (filters && fabsf(__fdiv_rn(top, rules.temperature)) < kInfinity) {
                    threshold = threshold_of(shared, group, slice, top);
                }
            }
            const Draw draw{rules.noise, rules.temperature, threshold};
            best = shared.drawn.reduce(group, draw.best_of(slice, filters ? candidate_id(best) : 0));
        }
    }
    if (group.rank == 0 && threadIdx.x < 32) place(p, row, candidate_id(best), position);
}

}  // namespace sampling
