// Sums of a tile whose inner dimension is split: its parts, in clusters that run at the same time, each finish an equal
// share of the tile's columns, and give the others what they have of theirs, through L2.
//
// Every warp exchanges with the warps of the same number in the blocks of the same rank, which hold the same fragments.
// A place is empty while its first word is 0: a sum that is 0 is sent as -0. Who has read it empties it again, for the
// next kernel.
#pragma once
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/quad.cuh"
#include "gemm/params.h"

namespace gemm {

__device__ __forceinline__ bool is_empty(float4 sums) {
    return __float_as_uint(sums.x) == 0;
}
__device__ __forceinline__ float4 never_empty(float a, float b, float c, float d) {
    return {__float_as_uint(a) == 0 ? -0.f : a, b, c, d};
}

// The first accumulators of a thread are those of the columns that its part finishes; then come those of the next part,
// and so on around. The first become sums over all parts, always added up in the same order: a repeat is bitwise equal.
template <typename Shape>
__device__ __forceinline__ void exchange_sums(float (&d)[Shape::kFragment], float4* exchange, int part) {
    constexpr int kSplits = Shape::kSplits, kUnits = Shape::kColumns / 8;  // of four accumulators
    constexpr int kAtOnce = 8;                                             // on their way from L2
    const int lane = threadIdx.x % 32, cluster = blockIdx.x / kCluster;
    const int warp = common::cluster_rank() * kMathWarps + threadIdx.x / 32;  // of the cluster
    const auto sums = [&](int receiver, int away) {
        const int of_all = (cluster - part + receiver) * kCluster * kMathWarps + warp;
        return exchange + ((of_all * (kSplits - 1) + away - 1) * kUnits * 32 + lane);
    };
    // The previous kernel may be another product in parts, which still reads its sums.
    common::wait_for_previous_kernel();
#pragma unroll
    for (int away = 1; away < kSplits; ++away) {
        float4* to = sums((part + away) % kSplits, away);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const float* v = d + (away * kUnits + i) * 4;
            common::store_relaxed(to + 32 * i, never_empty(v[0], v[1], v[2], v[3]));
        }
    }
#pragma unroll
    for (int away = 1; away < kSplits; ++away) {
        float4* from = sums(part, away);
#pragma unroll
        for (int first = 0; first < kUnits; first += kAtOnce) {
            float4 v[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (first + i < kUnits) v[i] = common::load_relaxed(from + 32 * (first + i));
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (first + i >= kUnits) break;
                float4* place = from + 32 * (first + i);
                while (is_empty(v[i])) v[i] = common::load_relaxed(place);
                common::store_relaxed(place, {});
                float* sum = d + 4 * (first + i);
                sum[0] += v[i].x, sum[1] += v[i].y, sum[2] += v[i].z, sum[3] += v[i].w;
            }
        }
    }
}

}  // namespace gemm
