// The online-softmax state, in the base-2 domain: scores are multiplied by scale * log2(e) so that exp is one
// instruction.
//
// A state stands for a set of tokens: `max` is their largest score, `sum` = sum of 2^(score - max). The weighted values
// that belong to it are kept beside it and scaled by the same factors. The empty set is (-inf, 0).
#pragma once
#include "common/exp2.cuh"

namespace decode_attn {

using common::exp2_fast;

struct SoftmaxState {
    float max, sum;

    __device__ static SoftmaxState empty() { return {-INFINITY, 0.0f}; }

    // The factor that moves what was gathered under `max` to the reference `target` >= max; 0 for the empty set.
    __device__ float factor(float target) const { return max == -INFINITY ? 0.0f : exp2_fast(max - target); }

    // Moves the state to `target` (> -inf) and returns the factor for the values beside it.
    __device__ float rescale(float target) {
        const float scale = factor(target);
        max = target;
        sum *= scale;
        return scale;
    }

    // 1 / sum, the factor that finishes the values; 0 for the empty set, whose output is zero.
    __device__ float normalizer() const { return max == -INFINITY ? 0.0f : __fdividef(1.0f, sum); }

    // Natural-log sum of exponentials of the scaled scores; -inf for the empty set.
    __device__ float log_sum_exp() const { return (max + __log2f(sum)) * 0.6931471805599453f; }
};

}  // namespace decode_attn
