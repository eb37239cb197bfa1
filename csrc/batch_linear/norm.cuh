// RMSNorm on the way to the tensor cores: warps that multiply its weight into x, in place in the ring, some stages
// ahead of those that multiply matrices, and sum the squares of x beside it. Its scale, one number a token, waits for
// the epilogue (finish.cuh).
#pragma once
#include "batch_linear/finish.cuh"

namespace batch_linear {

// A thread has 8 columns of every kRowsApart-th token.
template <int kTokens>
struct Norm {
    static constexpr int kRowsApart = kNormThreads / 8, kRows = kTokens / kRowsApart;
    static_assert(kTokens % kRowsApart == 0 && kRowsApart % 8 == 0);
    const Params& p;
    const Block& b;
    const int thread = threadIdx.x - (kConsumers + 32), chunk = thread % 8, first = thread / 8;
    float squares[kRows] = {};

    __device__ __forceinline__ void multiply(uint32_t x, uint4 norm) {
        const uint32_t place = x + first * 128 + (chunk ^ first % 8) * 16;
        const uint32_t factors[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            uint32_t v[4];
            common::load_shared(v, place + i * kRowsApart * 128);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float2 pair = Pack::to_floats(v[k]);
                squares[i] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares[i]));
                v[k] = common::multiply_pairs(v[k], factors[k]);
            }
            common::store_shared(place + i * kRowsApart * 128, v);
        }
    }

    __device__ __forceinline__ void run() {
        const uint4* norm = static_cast<const uint4*>(p.norm) + b.first_step * kStageColumns / 8;
#pragma unroll 1
        for (int i = thread; i < b.steps * kStageColumns / 8; i += kNormThreads)
            b.at<uint4>(p.norm_offset)[i] = __ldg(norm + i);
        common::named_sync(2, kNormThreads);
        int stage = 0;
        uint32_t phase = 0;
#pragma unroll 1
        for (int step = 0; step < b.steps; ++step) {
            const uint4 factors = b.at<uint4>(p.norm_offset)[step * kStageColumns / 8 + chunk];
            common::mbarrier_wait(b.full(stage), phase);
            multiply(b.base + stage * stage_bytes(p.tile_rows, kTokens) + row_bytes(p.tile_rows), factors);
            common::fence_async_proxy();
            __syncwarp();
            if (thread % 32 == 0) common::mbarrier_arrive(b.ready(stage));
            if (++stage == p.stages) stage = 0, phase ^= 1;
        }
        if (p.splits > 1) common::cluster_wait();  // the other blocks' barriers exist
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float sum = squares[i];
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (chunk == 0) finish(first + i * kRowsApart, sum);
        }
        if (p.splits == 1) common::named_arrive(1, kConsumers + kNormThreads);
    }

    // The sum of a token's squares over this block's columns: into its scale, or to all blocks of the cluster.
    __device__ __forceinline__ void finish(int token, float sum) {
        if (p.splits == 1) {
            b.own().scale[token] = scale_of(p, sum);
            return;
        }
        const uint32_t offset = uint32_t(offsetof(Tail, squares)) + (b.rank * kMaxTokens + token) * 4;
        for (int rank = 0; rank < p.splits; ++rank)
            common::send(common::in_block(b.base + b.tail + offset, rank), common::in_block(b.received(), rank), sum);
    }
};

}  // namespace batch_linear
