// Gumbel-max: the token with the greatest logit / temperature + noise, and the next best ones in case that filters turn
// it down.
//
// One pass over a block's slice makes a list of all tokens that may be among the best; nearly all others are ruled out
// eight at a time, by an upper bound of their noise. Only those on the list get the exact logarithms.
#pragma once
#include "sampling/noise.cuh"
#include "sampling/nucleus.cuh"
#include "sampling/row.cuh"
#include "sampling/row_group.cuh"

namespace sampling {

// How far the cheap bounds of a perturbed score may be off: they multiply by 1 / temperature and use approximate
// logarithms.
__device__ __forceinline__ float slack(float score) {
    return 1e-3f + 1e-6f * fabsf(score);
}

// The floats beside x; -0 is 0.
__device__ __forceinline__ float next_above(float x) {
    return from_ordered(ordered(x + 0.f) + 1);
}
__device__ __forceinline__ float next_below(float x) {
    return -next_above(-x);
}

// Which tokens of a row may be drawn, and what decides between them but for the noise.
struct Draw {
    float temperature;
    float threshold;  // logits whose score is below this one's cannot be drawn; -inf: all can
    float threshold_score;
    float lowest;     // lower logits cannot be drawn
    bool may_reject;  // the best one may be turned down, so the next ones are wanted too

    __device__ static Draw of(float temperature, float threshold, bool may_reject) {
        // Logits just below the threshold can have the same score.
        const float below = threshold - fmaxf(fabsf(threshold) * 0x1p-21f, 1e-30f);
        return {temperature, threshold, __fdiv_rn(threshold, temperature), fmaxf(below, -kLargest), may_reject};
    }
    __device__ __forceinline__ float score(float x) const { return __fdiv_rn(x, temperature); }
    // The greatest float with the score of x, except that it looks no further than a few.
    __device__ float last_of_score(float x) const {
        for (int i = 0; i < 4 && score(next_above(x)) == score(x); ++i) x = next_above(x);
        return x;
    }
    __device__ __forceinline__ uint64_t exact(float x, uint32_t word, uint32_t id) const {
        const float its_score = score(x);
        return its_score < threshold_score ? 0 : pack_candidate(ordered_for_max(its_score + gumbel(word)), id);
    }
};

// The best tokens of a row, in order, each with a greater logit than the one before: if filters turn one down because
// too many logits are greater, its successor is the next that they may leave.
struct Finalists {
    int count;
    uint32_t ids[kFinalists];
    float logits[kFinalists];
    float top;  // the row's greatest logit
};

// One row's tokens that may be among the best, by a block, in shared memory.
struct Contest {
    static constexpr int kGroups = 4;  // of warps. The list has the best token of each, so that many at least
    static constexpr int kCapacity = kThreads;
    static constexpr int kWords = kFinalists + (kFinalists + 1) / 2 + 1;
    static constexpr uint32_t kNoLimit = 0x00800000u;  // ordered(-kLargest)
    static_assert(kFinalists % 2 == 1);

    struct Entry {
        uint64_t candidate;  // with an upper bound of its perturbed score, or the exact one
        float x;
        uint32_t word;
    };

    // For each group of warps: tokens whose perturbed score is sure to be less are worse than one of the group's. If
    // only the best token is wanted, all warps are one group.
    uint4 limits;
    uint32_t num_entries;
    uint64_t odd;  // the best of those that did not go to the list: it is full, or scores are not finite
    Entry entries[kCapacity];
    float tops[kWarps];
    Exchange<kWords> exchange;
    Noise noise;
    Draw draw;
    Finalists result;

    // By one thread, as is setting `noise` and `draw`.
    __device__ __forceinline__ void clear() {
        const uint32_t others = draw.may_reject ? kNoLimit : ordered(kInfinity);
        limits = make_uint4(kNoLimit, others, others, others);
        num_entries = 0;
        odd = none();
    }

    // All threads of the group call it, after clear() and a synchronisation; after another one all have the result.
    template <typename T>
    __device__ __forceinline__ void hold(const RowGroup& group, const Slice<T>& slice) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const float top = ordered_top(enlist(slice));
        if (lane == 0) tops[warp] = top;
        __syncthreads();
        const float floor = limit();
        const int count = min(num_entries, kCapacity);
        if (threadIdx.x < count) {
            Entry& entry = entries[threadIdx.x];
            const bool hopeful = !(candidate_score(entry.candidate) < floor);
            entry.candidate = hopeful ? draw.exact(entry.x, entry.word, candidate_id(entry.candidate)) : 0;
        }
        __syncthreads();
        if (warp == 0) {
            uint64_t best[kFinalists];
            float logits[kFinalists + 1];
#pragma unroll
            for (int i = 0; i < kFinalists; ++i) {
                best[i] = 0, logits[i] = 0.f;
                if (i > 0 && !draw.may_reject) continue;
                uint64_t mine = i == 0 ? odd : 0;
                float x = 0.f;
                if (i == 0 && odd != none()) x = static_cast<float>(slice.row[candidate_id(odd)]);
#pragma unroll 1
                for (int j = lane; j < count; j += 32) {
                    const bool next = i == 0 || entries[j].x > logits[i - 1];
                    if (next && entries[j].candidate > mine) mine = entries[j].candidate, x = entries[j].x;
                }
                best[i] = warp_max(mine);
                logits[i] = __shfl_sync(kAllLanes, x, __ffs(__ballot_sync(kAllLanes, mine == best[i])) - 1);
            }
            logits[kFinalists] = ordered_top(lane < kWarps ? tops[lane] : -kInfinity);
            uint64_t words[kWords];
#pragma unroll
            for (int i = 0; i < kFinalists; ++i) words[i] = best[i];
#pragma unroll
            for (int i = 0; i <= kFinalists; i += 2) {
                words[kFinalists + i / 2] =
                    static_cast<uint64_t>(float_bits(logits[i])) << 32 | float_bits(logits[i + 1]);
            }
            // Below it this block may have left out something.
            words[kWords - 1] = ordered(odd == none() ? floor + slack(floor) : kInfinity);
            join(group, exchange.swap(group, words));
        }
    }

  private:
    __device__ __forceinline__ static uint64_t none() { return pack_candidate(ordered(-kInfinity), 0); }
    __device__ __forceinline__ static float ordered_top(float top) {
        return from_ordered(__reduce_max_sync(kAllLanes, ordered_for_max(top)));
    }

    // A token whose perturbed score is sure to be less is not among the best.
    __device__ __forceinline__ float limit() const {
        uint4 of;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(of.x), "=r"(of.y), "=r"(of.z), "=r"(of.w)
                     : "r"(common::shared_address(&limits)));
        return from_ordered(min(min(of.x, of.y), min(of.z, of.w)));
    }
    // From a lower bound of a perturbed score. Twice: for its own error, and for that of what will be compared with it.
    __device__ __forceinline__ static float limit_of(float at_least) { return at_least - 2 * slack(at_least); }

    // Fills the list; returns this thread's greatest logit.
    template <typename T>
    __device__ __forceinline__ float enlist(const Slice<T>& slice) {
        const float inverse = 1.f / draw.temperature, lowest = draw.lowest;
        const int my_group = draw.may_reject ? threadIdx.x / 32 % kGroups : 0;
        float top = -kInfinity;
        bool first_visit = true;
        slice.for_each_in_turn([&](const Chunk<T>& chunk, int first) {
            // Comparisons are such that NaN is looked at.
            const float greatest = chunk.max();
            top = max_nan(top, greatest);
            const bool empty = greatest < lowest;
            float floor = limit();
            const bool hopeless = empty || fmaf(greatest, inverse, kMostNoise) < floor;
            if (!first_visit && __all_sync(kAllLanes, hopeless)) return;
            uint32_t words[kChunk], least = 0xFFFFFFFFu;
            noise.words<2>(first / 4, words);
#pragma unroll
            for (const uint32_t word : words) least = min(least, word);
            // The lower the word, the greater its noise: no token here does better than this.
            const bool hopeful = !empty & !(fmaf(greatest, inverse, gumbel_at_most(least)) < floor);
            if (!first_visit && !__any_sync(kAllLanes, hopeful)) return;

            float x[kChunk], at_most[kChunk];
            chunk.unpack(x);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                at_most[i] = x[i] < lowest ? -kInfinity : fmaf(x[i], inverse, gumbel_at_most(words[i]));
            }
            // The lower bound of the most hopeful one raises the limit.
            float most = -kInfinity;
            int which = 0;
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                if (at_most[i] > most) most = at_most[i], which = i;
            }
            const float best_x = chunk.at(which);
            const float bound = fmaf(best_x, inverse, gumbel_at_least(pick(words, which)));
            const bool counts = most > -kInfinity && fabsf(bound) < 1e30f && best_x >= draw.threshold;
            const uint32_t raised = __reduce_max_sync(kAllLanes, ordered(counts ? limit_of(bound) : -kInfinity));
            if (threadIdx.x % 32 == 0) atomicMax(&limits.x + my_group, raised);
            if (first_visit) {  // all warps begin with a good limit
                __syncthreads();
                first_visit = false;
                floor = limit();
            }
            uint32_t enlisted = 0;  // a bit a token
#pragma unroll
            for (int i = 0; i < kChunk; ++i) enlisted |= !(at_most[i] < floor) ? 1u << i : 0;
#pragma unroll 1
            while (enlisted) {
                const int i = __ffs(enlisted) - 1;
                enlisted &= enlisted - 1;
                add(chunk.at(i), pick(words, i), pick(at_most, i), first + i);
            }
        });
        return top;
    }
    __device__ __forceinline__ void add(float x, uint32_t word, float at_most, uint32_t id) {
        const uint32_t place = fabsf(at_most) < 1e30f ? atomicAdd(&num_entries, 1u) : kCapacity;
        if (place < kCapacity) {
            entries[place] = {pack_candidate(ordered(at_most), id), x, word};
        } else {
            const unsigned long long candidate = draw.exact(x, word, id);
            if (candidate > *const_cast<volatile uint64_t*>(&odd)) {
                atomicMax(reinterpret_cast<unsigned long long*>(&odd), candidate);
            }
        }
    }

    // The result from what all blocks said, by the first warp.
    __device__ __forceinline__ void join(const RowGroup& group, const uint64_t (*said)[kWords]) {
        const int lane = threadIdx.x % 32;
        uint64_t best[kFinalists] = {};
        uint32_t bits[kFinalists + 1] = {};
        float logits[kFinalists] = {};
        uint32_t top = 0, floor = 0;
        if (lane < group.size) {
            const uint64_t* words = said[lane];
#pragma unroll
            for (int i = 0; i < kFinalists; ++i) best[i] = words[i];
#pragma unroll
            for (int i = 0; i <= kFinalists; i += 2) {
                bits[i] = words[kFinalists + i / 2] >> 32,
                bits[i + 1] = static_cast<uint32_t>(words[kFinalists + i / 2]);
            }
#pragma unroll
            for (int i = 0; i < kFinalists; ++i) logits[i] = bits_float(bits[i]);
            top = ordered_for_max(bits_float(bits[kFinalists]));
            floor = words[kWords - 1];
        }
        floor = __reduce_max_sync(kAllLanes, floor);
        top = __reduce_max_sync(kAllLanes, top);
        int known = 0;
        float last = 0.f;
#pragma unroll
        for (int i = 0; i < kFinalists; ++i) {
            if (i > 0 && !draw.may_reject) break;
            uint64_t mine = 0;
            float x = 0.f;
#pragma unroll
            for (int j = 0; j < kFinalists; ++j) {
                const bool next = i == 0 || logits[j] > last;
                if (next && best[j] > mine) mine = best[j], x = logits[j];
            }
            const uint64_t winner = warp_max(mine);
            last = __shfl_sync(kAllLanes, x, __ffs(__ballot_sync(kAllLanes, mine == winner)) - 1);
            if (i == 0 || (known == i && winner > 0 && winner >> 32 >= floor)) known = i + 1;
            if (lane == 0) result.ids[i] = candidate_id(winner), result.logits[i] = last;
        }
        if (lane == 0) result.count = known, result.top = from_ordered(top);
    }
};

}  // namespace sampling
