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

// One number from global to shared memory, without waiting for it.
template <typename N>
__device__ __forceinline__ void fetch_word(N* target, const N* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(common::shared_address(target)), "l"(source),
                 "n"(sizeof(N))
                 : "memory");
}

__device__ __forceinline__ void await_words() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// One row's rules, as its blocks keep them in shared memory.
struct Rules {
    int64_t top_k, seed, request, sample;
    float temperature, top_p, min_p;

    // Begins to copy them; every thread waits, then the block synchronises. Called by one warp.
    __device__ __forceinline__ void fetch(const Params& p, int row) {
        switch (threadIdx.x) {
            case 0:
                return fetch_word(&top_k, p.top_k + row);
            case 1:
                return fetch_word(&seed, p.seed + row);
            case 2:
                return fetch_word(&request, p.request + row);
            case 3:
                return fetch_word(&sample, p.sample + row);
            case 4:
                return fetch_word(&temperature, p.temperature + row);
            case 5:
                return fetch_word(&top_p, p.top_p + row);
            case 6:
                return fetch_word(&min_p, p.min_p + row);
        }
    }
    __device__ int limit(int vocab_size) const { return top_k > 0 && top_k < vocab_size ? static_cast<int>(top_k) : 0; }
    __device__ bool filter(int vocab_size) const { return limit(vocab_size) > 0 || top_p < 1.f || min_p > 0.f; }
    // Ids and positions in the generator's counter are 32-bit words.
    __device__ Noise noise(const Noise::Keys& keys, int position) const {
        return {keys, static_cast<uint32_t>(position), static_cast<uint32_t>(request), static_cast<uint32_t>(sample)};
    }
};

// What follows from the rules alone.
struct Prepared {
    float mass_scale;      // Weight::scale
    float reach, no_mass;  // how far below the greatest logit top-p's bins reach, and where a logit weighs nothing
    float min_p;           // how far below the greatest logit min-p cuts, negative

    __device__ static Prepared of(const Rules& rules, int vocab_size) {
        // All tokens further than `reach` below have less than 1 - top_p of the mass, or none in the units of Weight.
        constexpr float kNoMass = 22.5f;  // e^-22.5 < 2^-32
        const float reach = fminf(logf(vocab_size / (1.f - rules.top_p)) + 0.1f, kNoMass);
        return {fminf(1.44269504f / rules.temperature, 1e37f), reach * rules.temperature, kNoMass * rules.temperature,
                rules.temperature * logf(rules.min_p)};
    }
};

struct Shared {
    BestOfRow greatest, drawn;
    Rules rules;
    Prepared prepared;
    Noise::Keys noise_keys;
    uint32_t limit;       // Draw::limit
    CutoffMemory cutoff;  // last: only the filtering kernels have it
};

template <typename T>
__device__ __forceinline__ uint64_t greatest_of(const Slice<T>& slice) {
    float best = -kInfinity;
    uint32_t id = 0;
    slice.template for_each<sizeof(T) == 2 ? 4 : 2>([&](const Chunk<T>& chunk, int first) {
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
__device__ void begin_top_k(Search& search, float top, int limit) {
    constexpr float kReach = 12.f;  // nearly always holds the greatest k logits
    search.weight = {false, top, 0.f};
    search.floor = -kInfinity;
    search.start = search.lowest = at_or_below<T>(fmaxf(__fsub_rd(top, kReach), -1e38f));
    search.target = limit;
    search.begin<T>();
}

// The same for top-p, among the logits from `floor` on. `tied`: logits equal to `floor` that top-k left out, and whose
// probability therefore does not count.
template <typename T>
__device__ void begin_top_p(Search& search, const Prepared& prepared, float top_p, float top, float floor,
                            uint64_t tied) {
    const float start = at_or_below<T>(fmaxf(__fsub_rd(top, prepared.reach), -1e38f));
    search.weight = {true, top, prepared.mass_scale};
    search.floor = floor;
    search.lowest = fmaxf(__fsub_rd(top, prepared.no_mass), floor);
    search.start = fmaxf(start, floor);
    search.top_p = top_p;
    search.excess = tied > 0 ? tied * search.weight.of(floor) : 0;
    search.begin<T>();
}

// The lowest logit that the row's filters leave, given its greatest; -inf if they leave all.
template <typename T>
__device__ __forceinline__ float threshold_of(Shared& shared, const RowGroup& group, const Slice<T>& slice, float top) {
    const Rules& rules = shared.rules;
    Search& search = shared.cutoff.search;
    const int limit = rules.limit(slice.vocab_size);
    float threshold = -kInfinity;
    uint64_t tied = 0;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
        if (filter == 0 ? limit == 0 : rules.top_p >= 1.f) continue;
        if (threadIdx.x == 0) {
            if (filter == 0) {
                begin_top_k<T>(search, top, limit);
            } else {
                begin_top_p<T>(search, shared.prepared, rules.top_p, top, threshold, tied);
            }
        }
        __syncthreads();
        shared.cutoff.run(group, slice);
        threshold = fmaxf(threshold, search.value);
        if (filter == 0) tied = search.value > -kInfinity ? search.above + search.at - limit : 0;
        __syncthreads();  // before thread 0 sets up the next
    }
    if (rules.min_p > 0.f) threshold = fmaxf(threshold, top + shared.prepared.min_p);
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
    if (threadIdx.x == 0) {
        shared.greatest.init();
        shared.drawn.init();
        shared.limit = Draw::kNoLimit;
        if constexpr (kFilters) shared.cutoff.init();
    }
    group.arrive();
    if constexpr (kFilters) shared.cutoff.histogram.clear();
    group.meet();
    common::wait_for_previous_kernel();
    common::allow_next_kernel();

    if (kMode != Mode::kGreedy && threadIdx.x < 32) shared.rules.fetch(p, row);

    const bool places = p.token_ids != nullptr;
    const int position = p.positions[row] + (places ? 1 : 0);
    const Slice<T> slice = Slice<T>::of(p, row, group.rank);
    if (p.forbid_early_stops && position < p.first_stop_positions[row] && position > 0) forbid_stops(p, slice, row);

    uint64_t best = 0;
    if (kMode != Mode::kUnfiltered) best = greatest_of(slice);
    if constexpr (kMode != Mode::kGreedy) await_words();
    if (places &&
        position <= 0) {  // an idle row; asked late, so that its position and its logits come at the same time
        if (group.rank == 0 && threadIdx.x == 0) p.out[row] = 0;
        return;
    }
    if constexpr (kMode == Mode::kUnfiltered) {
        __syncthreads();
    } else {
        shared.greatest.publish(group, best);
    }
    if constexpr (kMode != Mode::kGreedy) {
        const Rules& rules = shared.rules;
        // By the second warp: the first one is busy with the candidates.
        if (threadIdx.x / 32 == 1) {
            const uint32_t lane = threadIdx.x % 32;
            if (lane < Noise::kRounds) Noise::fill(shared.noise_keys, rules.seed, lane);
            if (kFilters && lane == 31) shared.prepared = Prepared::of(rules, p.vocab_size);
        }
        __syncthreads();
    }
    if constexpr (kMode != Mode::kUnfiltered) best = shared.greatest.collect(group);
    if constexpr (kMode != Mode::kGreedy) {
        const Rules& rules = shared.rules;
        if (rules.temperature != 0.f) {
            float threshold = -kInfinity;
            if constexpr (kFilters) {
                const float top = candidate_score(best);
                if (rules.filter(p.vocab_size) && fabsf(__fdiv_rn(top, rules.temperature)) < kInfinity) {
                    threshold = threshold_of(shared, group, slice, top);
                }
            }
            const Draw draw{rules.noise(shared.noise_keys, position), rules.temperature, threshold, shared.limit};
            best = kFilters ? draw.best_of(slice, candidate_score(best), candidate_id(best)) : draw.best_of(slice);
            shared.drawn.publish(group, best);
            best = shared.drawn.collect(group);
        } else if constexpr (kMode == Mode::kUnfiltered) {
            shared.greatest.publish(group, greatest_of(slice));
            best = shared.greatest.collect(group);
        }
    }
    if (group.rank == 0 && threadIdx.x < 32) place(p, row, candidate_id(best), position);
}

}  // namespace sampling
