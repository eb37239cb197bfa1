// Sums of a tile whose inner dimension is split: its parts, in clusters that run at the same time, each finish an equal
// share of the tile's columns, and give the others what they have of theirs, through L2.
//
// Every warp exchanges with the warps of the same number in the blocks of the same rank, which hold the same fragments.
// Its counter tells it how many have sent. Whoever has seen all of them sets it back to 0 for the next kernel.
#pragma once
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "gemm/params.h"

namespace gemm {

// After what this warp, synchronised before, has written.
__device__ __forceinline__ void add_release(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// The first accumulators of a thread are those of the columns that its part finishes; then come those of the next part,
// and so on around. The first become sums over all parts, always added up in the same order: a repeat is bitwise equal.
template <typename Shape>
__device__ __forceinline__ void exchange_sums(float (&d)[Shape::kFragment], const Exchange& exchange, int part) {
    constexpr int kSplits = Shape::kSplits, kQuads = Shape::kColumns / 8;  // of four accumulators
    const int lane = threadIdx.x % 32, cluster = blockIdx.x / kCluster;
    const int warp = common::cluster_rank() * kMathWarps + threadIdx.x / 32;  // of the cluster
    const auto warp_of = [&](int other) { return (cluster - part + other) * kCluster * kMathWarps + warp; };
    const auto sums = [&](int receiver, int away) {
        return exchange.sums + ((warp_of(receiver) * (kSplits - 1) + away - 1) * kQuads * 32 + lane);
    };
    // The previous kernel may be another product in parts, which still reads its sums and counters.
    common::wait_for_previous_kernel();
#pragma unroll
    for (int away = 1; away < kSplits; ++away) {
        float4* to = sums((part + away) % kSplits, away);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float* v = d + (away * kQuads + i) * 4;
            __stcg(to + 32 * i, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
    __syncwarp();
    if (lane > 0 && lane < kSplits) add_release(exchange.counters + warp_of((part + lane) % kSplits));
    unsigned* own = exchange.counters + warp_of(part);
    if (lane == 0) {
        while (load_acquire(own) != kSplits - 1) {
        }
        *own = 0;
    }
    __syncwarp();
#pragma unroll
    for (int away = 1; away < kSplits; ++away) {
        const float4* from = sums(part, away);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float4 v = __ldcg(from + 32 * i);
            d[4 * i] += v.x, d[4 * i + 1] += v.y, d[4 * i + 2] += v.z, d[4 * i + 3] += v.w;
        }
    }
}

}  // namespace gemm
