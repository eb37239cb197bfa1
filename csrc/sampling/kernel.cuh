// Drawing one token a row. Grid: (blocks_per_row, batch); the blocks of a row form a cluster and take equal slices of
// it.
//
// A greedy row is one pass over the logits. Any other row is drawn from all tokens first, as if there were no top-p:
// what wins among them wins among the nucleus too if it lies there, and that needs one more pass. If neither it nor the
// next best tokens lie there, the same again among those with a greater logit. Top-k and min-p need the greatest logit
// first, top-k a search. Rows choose for themselves; kMode only leaves code out. If the greatest score is not finite
// (NaN or infinite logits, a row of -inf) no filter applies: the first NaN is drawn, else the first +inf, else token 0.
// Never an id outside of the row.
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
    // Whether a filter begins at the greatest logit.
    __device__ bool needs_top(int vocab_size) const { return limit(vocab_size) > 0 || min_p > 0.f; }
};

struct Shared {
    BestOfRow greatest;
    int position;  // of the token to draw
    Rules rules;   // from here on not in the greedy kernel
    Contest contest;
    Nucleus nucleus;  // from here on only in the filtering kernels
    CutoffMemory cutoff;
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

// What must be known to tell which of the best tokens top-p leaves. Of the logits equal to the last one of top-k, the
// weight counts as many as top-k keeps.
template <typename T>
__device__ __forceinline__ Nucleus::Question question(const Shared& shared, int vocab_size) {
    constexpr float kNoMass = 22.5f;  // e^-22.5 < 2^-32: lower logits weigh nothing
    const Draw& draw = shared.contest.draw;
    const Finalists& best = shared.contest.result;
    Nucleus::Question ask;
    ask.weight = {best.top, fminf(1.44269504f / draw.temperature, 1e37f)};
    ask.top_p = shared.rules.top_p;
    ask.bounds[0] = __fsub_rd(best.top, kNoMass * draw.temperature);
    ask.excess = 0;
    const int limit = shared.rules.limit(vocab_size);
    const Search& cutoff = shared.cutoff.search;
    if (limit > 0 && cutoff.value > -kInfinity) {
        ask.excess = static_cast<uint64_t>(cutoff.above + cutoff.at - limit) * ask.weight.of(cutoff.value);
        ask.bounds[0] = fmaxf(ask.bounds[0], next_below(cutoff.value));
    }
#pragma unroll
    for (int i = 0; i < kFinalists; ++i) {
        const float x = best.logits[i];
        // Only fp32 has neighbours so close that they can have the same score.
        ask.bounds[1 + i] = i >= best.count ? kInfinity : sizeof(T) > 2 ? draw.last_of_score(x) : x;
    }
    return ask;
}

// Draws a token of a row whose temperature is not 0. `top` is its greatest logit if top-k or min-p apply, and not used
// otherwise. All threads of the group call it.
template <bool kFilters, typename T>
__device__ __forceinline__ uint32_t draw_token(Shared& shared, const RowGroup& group, const Slice<T>& slice,
                                               float top) {
    const Rules& rules = shared.rules;
    Contest& contest = shared.contest;
    float threshold = -kInfinity;  // lower logits are not to be drawn
    if constexpr (kFilters) {
        if (rules.needs_top(slice.vocab_size) && fabsf(__fdiv_rn(top, rules.temperature)) < kInfinity) {
            const int limit = rules.limit(slice.vocab_size);
            if (limit > 0) {
                shared.cutoff.run(group, slice, top, limit);
                threshold = shared.cutoff.search.value;
            }
            if (rules.min_p > 0.f) {
                threshold = fmaxf(threshold, fminf(top + rules.temperature * logf(rules.min_p), top));
            }
        }
    }
    if (threadIdx.x == 0) contest.draw = Draw::of(rules.temperature, threshold, kFilters && rules.top_p < 1.f);
    for (;;) {
        if (threadIdx.x == 0) contest.clear();
        __syncthreads();
        contest.hold(group, slice);
        if constexpr (kFilters) {
            if (contest.draw.may_reject && threadIdx.x == 0) {
                shared.nucleus.ask = question<T>(shared, slice.vocab_size);
            }
        }
        __syncthreads();
        const bool stands =
            !kFilters || !contest.draw.may_reject || !(fabsf(contest.draw.score(contest.result.top)) < kInfinity);
        if (stands) return contest.result.ids[0];
        if constexpr (kFilters) {
            const int outside = shared.nucleus.outside(group, slice), count = contest.result.count;
            if (outside < count) return contest.result.ids[outside];
            if (threadIdx.x == 0) contest.draw.lowest = next_above(contest.result.logits[count - 1]);
        }
    }
}

// A stop id that may not be drawn yet becomes -inf, by the block whose slice holds it.
template <typename T>
__device__ void forbid_stops(const Params& p, const Slice<T>& slice, int row) {
#pragma unroll 1
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
#pragma unroll 1
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
    constexpr bool kDraws = kMode != Mode::kGreedy, kFilters = kMode == Mode::kFiltered;
    __shared__ __align__(16) unsigned char memory[kFilters ? sizeof(Shared)
                                                  : kDraws ? offsetof(Shared, nucleus)
                                                           : offsetof(Shared, rules)];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const RowGroup group = RowGroup::here();
    const int row = blockIdx.y;
    if (threadIdx.x == 0) {
        shared.greatest.init();
        if constexpr (kDraws) shared.contest.exchange.init();
        if constexpr (kFilters) shared.nucleus.exchange.init(), shared.cutoff.init();
    }
    group.arrive();
    if constexpr (kFilters) shared.cutoff.clear();
    group.meet();
    common::wait_for_previous_kernel();
    common::allow_next_kernel();

    if (kDraws && threadIdx.x < 32) shared.rules.fetch(p, row);

    const bool places = p.token_ids != nullptr;
    const int position = p.positions[row] + (places ? 1 : 0);
    if (threadIdx.x == 0) shared.position = position;
    const Slice<T> slice = Slice<T>::of(p, row, group.rank);
    if (p.forbid_early_stops && position < p.first_stop_positions[row] && position > 0) forbid_stops(p, slice, row);

    uint64_t greatest = 0;
    if constexpr (!kDraws) greatest = greatest_of(slice);
    if constexpr (kDraws) await_words();
    if (places &&
        position <= 0) {  // an idle row; asked late, so that its position and its logits come at the same time
        if (group.rank == 0 && threadIdx.x == 0) p.out[row] = 0;
        return;
    }
    uint32_t token;
    if constexpr (kDraws) {
        __syncthreads();
        const Rules& rules = shared.rules;
        // Ids and positions in the generator's counter are 32-bit words.
        if (threadIdx.x == 0) shared.contest.noise.fill(rules.seed, position, rules.request, rules.sample);
        const bool is_greedy = rules.temperature == 0.f;
        if (is_greedy || (kFilters && rules.needs_top(p.vocab_size))) {
            shared.greatest.publish(group, greatest_of(slice));
            greatest = shared.greatest.collect(group);
        }
        token =
            is_greedy ? candidate_id(greatest) : draw_token<kFilters>(shared, group, slice, candidate_score(greatest));
    } else {
        shared.greatest.publish(group, greatest);
        token = candidate_id(shared.greatest.collect(group));
    }
    if (group.rank == 0 && threadIdx.x < 32) place(p, row, token, shared.position);
}

}  // namespace sampling
