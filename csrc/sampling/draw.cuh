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

    // This thread's best candidate of the slice; (-inf, fallback) if it has none.
    // Nearly all tokens are ruled out by an upper bound of their noise; few get the exact logarithms.
    template <typename T>
    __device__ uint64_t best_of(const Slice<T>& slice, uint32_t fallback) const {
        const float inverse = 1.f / temperature;
        const float threshold_score = __fdiv_rn(threshold, temperature);
        // Logits just below the threshold can have the same score.
        const float lowest =
            threshold == -kInfinity ? -kLargest : threshold - fmaxf(fabsf(threshold) * 0x1p-21f, 1e-30f);
        uint64_t best = pack_candidate(ordered(-kInfinity), fallback);
        float limit = -kLargest;  // a token whose perturbed score is sure to be less cannot win
        slice.template for_each<2>([&](const Chunk<T>& chunk, int chunk_first) {
            const bool empty = chunk.max() < lowest;  // this and other comparisons are such that NaN is looked at
            if (!__any_sync(kAllLanes, !empty)) return;
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                const int first = chunk_first + 4 * half;
                uint32_t hopeful = 0;  // a bit a token
                float x[4], at_most[4];
                uint32_t words[4];
                chunk.unpack_half(half, x);
                noise.words(first / 4, words);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    at_most[i] = x[i] < lowest ? -kInfinity : fmaf(x[i], inverse, gumbel_at_most(words[i]));
                    hopeful |= !(at_most[i] < limit) ? 1u << i : 0;
                }
                if (!__any_sync(kAllLanes, hopeful)) continue;

                // The winner is at least as good as the lower bound of any token: raise the limit by the most hopeful
                // one.
                float most = -kInfinity, at_least = -kInfinity, x_most = -kInfinity;
                uint32_t word_most = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (at_most[i] > most) most = at_most[i], x_most = x[i], word_most = words[i];
                }
                const float score = fmaf(x_most, inverse, gumbel_at_least(word_most));
                if (fabsf(score) < 1e30f && __fdiv_rn(x_most, temperature) >= threshold_score) {
                    at_least = score - slack(score);
                }
                at_least = from_ordered(__reduce_max_sync(kAllLanes, ordered(at_least)));
                limit = fmaxf(limit, at_least - slack(at_least));
                hopeful = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) hopeful |= !(at_most[i] < limit) ? 1u << i : 0;
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

  private:
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
