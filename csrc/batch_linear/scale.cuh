// RMSNorm's scale, one number a token, for the epilogue (finish.cuh): from the sums of squares that the product before
// has left, while the other warps multiply.
#pragma once
#include "batch_linear/finish.cuh"

namespace batch_linear {

// Groups of threads, a token a thread, share out what there is to sum, always in the same order.
template <int kTokens>
__device__ __forceinline__ void make_scales(const Params& p, const Block& b) {
    constexpr int kGroups = kScaleThreads / kTokens;
    const int thread = threadIdx.x - (kConsumers + 32), token = thread % kTokens, group = thread / kTokens;
    const int first = first_of(p.squares.count, group, kGroups), last = first_of(p.squares.count, group + 1, kGroups);
    common::wait_for_previous_kernel();
    float sum = 0;
    if (group < kGroups && token < p.num_tokens) {
#pragma unroll 16
        for (int i = first; i < last; ++i) sum += __ldcg(p.squares.sums + i * p.num_tokens + token);
    }
    b.own().squares[thread] = sum;
    common::named_sync(2, kScaleThreads);
    if (thread < kTokens) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) squares += b.own().squares[i * kTokens + thread];
        b.own().scale[thread] = rsqrtf(squares / p.size + p.eps);
    }
    common::named_arrive(1, kConsumers + kScaleThreads);
}

}  // namespace batch_linear
