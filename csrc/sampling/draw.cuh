// Gumbel-max: the token with the greatest logit / temperature + noise.
#pragma once
#include "sampling/noise.cuh"
#include "sampling/row.cuh"
#include "sampling/row_group.cuh"

namespace sampling {

// How far the cheap bounds of a perturbed score may be off: they multiply by 1 / temperature and use approximate
// logarithms.
__device__ __forceinline__ float slack(float score) {
    return 1e-3f + 1e-6f * fabsf(score);
}

struct Draw {
    Noise noise;
    float temperature;
    float threshold;  // logits whose score is below this one's cannot be drawn; -inf: all can
    // In shared memory, for all warps of the block: a token whose perturbed score is sure to be less cannot win. It
    // only says what to skip: which warp raises it when does not change the winner.
    uint32_t& limit;

    static constexpr uint32_t kNoLimit = 0x00800000u;  // ordered(-kLargest)

    // This thread's best candidate of the slice, token 0 if it has none.
    template <typename T>
    __device__ __forceinline__ uint64_t best_of(const Slice<T>& slice) const {
        return better_than(pack_candidate(ordered(-kInfinity), 0), slice);
    }
    // The same, given a token that may be drawn: its id, and x, its logit.
    template <typename T>
    __device__ __forceinline__ uint64_t best_of(const Slice<T>& slice, float x, uint32_t id) const {
        uint32_t words[4];
        noise.words<1>(id / 4, words);
        const float score = fmaf(x, 1.f / temperature, gumbel_at_least(pick(words, id % 4)));
        if (threadIdx.x % 32 == 0 && fabsf(score) < 1e30f) atomicMax(&limit, ordered(limit_of(score)));
        return better_than(pack_candidate(ordered(-kInfinity), id), slice);
    }

  private:
    // Nearly all tokens are ruled out eight at a time, by an upper bound of their noise; few get the exact logarithms.
    template <typename T>
    __device__ __forceinline__ uint64_t better_than(uint64_t best, const Slice<T>& slice) const {
        const float inverse = 1.f / temperature;
        const float threshold_score = __fdiv_rn(threshold, temperature);
        // Logits just below the threshold can have the same score.
        const float lowest =
            threshold == -kInfinity ? -kLargest : threshold - fmaxf(fabsf(threshold) * 0x1p-21f, 1e-30f);
        slice.template for_each<sizeof(T) == 2 ? 2 : 1>([&](const Chunk<T>& chunk, int chunk_first) {
            // Comparisons are such that NaN is looked at.
            const float greatest = chunk.max();
            const bool empty = greatest < lowest;
            if (__all_sync(kAllLanes, empty)) return;
            float floor = from_ordered(*const_cast<volatile uint32_t*>(&limit));
            uint32_t all_words[kChunk], least = 0xFFFFFFFFu;
            noise.words<2>(chunk_first / 4, all_words);
#pragma unroll
            for (const uint32_t word : all_words) least = min(least, word);
            // The lower the word, the greater its noise: no token here does better than this.
            const bool chunk_hopeful = !empty && !(fmaf(greatest, inverse, gumbel_at_most(least)) < floor);
            if (!__any_sync(kAllLanes, chunk_hopeful)) return;
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                const int first = chunk_first + 4 * half;
                uint32_t hopeful = 0;  // a bit a token
                float x[4], at_most[4];
                uint32_t words[4];
                chunk.unpack_half(half, x);
                noise.words<1>(first / 4, words);
                float most = -kInfinity, x_most = -kInfinity;
                uint32_t word_most = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    at_most[i] = x[i] < lowest ? -kInfinity : fmaf(x[i], inverse, gumbel_at_most(words[i]));
                    if (at_most[i] > most) most = at_most[i], x_most = x[i], word_most = words[i];
                    hopeful |= !(at_most[i] < floor) ? 1u << i : 0;
                }
                if (!__any_sync(kAllLanes, hopeful)) continue;
                // The winner is at least as good as the lower bound of any token: raise the limit by the most hopeful
                // one.
                float at_least = -kInfinity;
                const float score = fmaf(x_most, inverse, gumbel_at_least(word_most));
                if (fabsf(score) < 1e30f && __fdiv_rn(x_most, temperature) >= threshold_score) {
                    at_least = limit_of(score);
                }
                const uint32_t raised = __reduce_max_sync(kAllLanes, ordered(at_least));
                if (threadIdx.x % 32 == 0) atomicMax(&limit, raised);
                floor = fmaxf(floor, from_ordered(raised));
                hopeful = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) hopeful |= !(at_most[i] < floor) ? 1u << i : 0;
                while (hopeful) {
                    const int i = __ffs(hopeful) - 1;
                    hopeful &= hopeful - 1;
                    const uint64_t drawn = exact(pick(x, i), threshold_score, pick(words, i), first + i);
                    best = drawn > best ? drawn : best;
                }
            }
        });
        return best;
    }

    // From a lower bound of a perturbed score. Twice: for its own error, and for that of what will be compared with it.
    __device__ __forceinline__ static float limit_of(float at_least) { return at_least - 2 * slack(at_least); }
    // values[i] without local memory
    template <typename V>
    __device__ __forceinline__ static V pick(const V (&values)[4], int i) {
        return i & 2 ? (i & 1 ? values[3] : values[2]) : (i & 1 ? values[1] : values[0]);
    }
    __device__ __forceinline__ uint64_t exact(float x, float threshold_score, uint32_t word, uint32_t id) const {
        const float score = __fdiv_rn(x, temperature);
        return score < threshold_score ? 0 : pack_candidate(ordered_for_max(score + gumbel(word)), id);
    }
};

}  // namespace sampling
