// y = x weight^T for the tokens of one decode step, up to 128, at the speed at which weights arrive from memory
// (sm_90a, bf16).
//
// A cluster of `splits` blocks makes a tile of up to 256 weight rows for all tokens, each block over its part of the
// inner dimension. One thread of a block streams boxes of weight and of x into a ring in shared memory, and asks for
// weight before the previous kernel has ended, because weights are constants: with half of an SM's shared memory each,
// this kernel's ring fills while the previous kernel's blocks still work. Up to two warpgroups multiply, straight from
// shared memory. RMSNorm costs no pass over x: its weight is part of `weight`, the product that makes x leaves sums of
// its squares, and the one behind scales its own.
//
// weight [num_rows, size], x [num_tokens, size], out [num_tokens, num_rows] (see Params); all contiguous bf16. weight
// is read before the previous kernel has ended: it must have been written by an earlier one.
#pragma once
#include <cuda.h>

#include "batch_linear/finish.cuh"
#include "batch_linear/multiply.cuh"
#include "batch_linear/scale.cuh"

namespace batch_linear {

using common::Cursor, common::wgmma_commit, common::wgmma_wait;

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}

// The warp that fills the ring: one lane of it copies. begin() asks for constants only.
template <int kTokens>
struct Producer {
    const Params& p;
    const Block& b;
    const CUtensorMap *weight, *x;
    const int ahead = min(p.ahead, b.steps), first = min(p.stages, b.steps);

    __device__ __forceinline__ void copy_weight(int stage, int step) {
        if (!common::elect_one()) return;
        common::mbarrier_expect(b.full(stage), stage_bytes(p.tile_rows, kTokens));
        copy_box(b.base + stage * row_bytes(p.tile_rows), weight, b.full(stage), (b.first_step + step) * kStageColumns,
                 b.tile * p.tile_rows, common::kEvictFirst);
    }
    __device__ __forceinline__ void copy_x(int stage, int step) {
        if (!common::elect_one()) return;
        copy_box(b.base + p.x_offset + stage * row_bytes(kTokens), x, b.full(stage),
                 (b.first_step + step) * kStageColumns, 0, common::kEvictLast);
    }
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int step = 0; step < ahead; ++step) copy_weight(step, step);
    }
    // The next kernel's weights should be on their way when this one's have been asked for: not before, because they
    // would only delay each other, and not after, because memory would rest.
    __device__ __forceinline__ void run() {
        common::wait_for_previous_kernel();
        if (b.steps - first <= p.trigger) common::allow_next_kernel();
#pragma unroll 1
        for (int step = 0; step < first; ++step) {
            if (step >= ahead) copy_weight(step, step);
            copy_x(step, step);
        }
        Cursor at;
#pragma unroll 1
        for (int step = first; step < b.steps; ++step) {
            common::mbarrier_wait(b.empty(at.stage), at.phase);
            copy_weight(at.stage, step);
            copy_x(at.stage, step);
            if (b.steps - step - 1 == p.trigger) common::allow_next_kernel();
            at.advance(p.stages);
        }
    }
};

template <int kTokens, int kRows, Form kForm>
__device__ __forceinline__ void consume(const Params& p, const Block& b) {
    const int lane = threadIdx.x % 32;
    common::wait_for_previous_kernel();
    Finisher<kTokens, kForm> finisher(p, b);
    finisher.begin();
    const int last_step = p.splits > 1 ? finisher.own.last_step(p) : b.steps;  // before peers may send

    Sums<kTokens, kRows> sums(p);
    const bool multiplies = sums.kGroups == 2 || common::uniform_warp() < 4;
    if (multiplies) {
        Cursor at;
        int before = 0;
#pragma unroll 1
        for (int step = 0; step < b.steps; ++step) {
            common::mbarrier_wait(b.full(at.stage), at.phase);
            sums.multiply(b.base + at.stage * row_bytes(p.tile_rows),
                          b.base + p.x_offset + at.stage * row_bytes(kTokens), step);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0 && lane == 0) common::mbarrier_arrive(b.empty(before));
            if (step == last_step + 1) allow_sending(p, b, lane);
            before = at.stage;
            at.advance(p.stages);
        }
        wgmma_wait<0>();
    }
    if (p.splits == 1) {
        finisher.wait_for_scales();
        if (multiplies) finisher.finish_alone(sums);
        return;
    }
    if (multiplies) {
        if (last_step + 1 >= b.steps) allow_sending(p, b, lane);
        finisher.send_sums(sums);
    } else {
        common::cluster_wait();
    }
    finisher.wait_for_scales();
    finisher.finish_received();
}

// Registers for two blocks an SM, this kernel's and the next one's, where their rings may leave room for both: not of
// SwiGLU's, and not where a tile is cut to give every SM one.
template <Form kForm>
constexpr bool leaves_room(int tokens, int rows) {
    return tokens <= 64 && rows != 96 && kForm != Form::kNormSwiGlu;
}

template <int kTokens, int kRows, Form kForm>
__global__ void __launch_bounds__(threads(kForm), leaves_room<kForm>(kTokens, kRows) ? 2 : 1)
    batch_linear_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ Params p) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t shared[];
    const int warp = common::uniform_warp(), rank = p.splits > 1 ? common::cluster_rank() : 0;
    // Asked for now, or the first x would wait for its map.
    if (warp == kConsumerWarps && common::elect_one()) {
        common::tma_prefetch_map(&weight);
        common::tma_prefetch_map(&x);
    }
    const int first_step = first_of(p.steps, rank, p.splits);
    const int steps = first_of(p.steps, rank + 1, p.splits) - first_step;
    const Block b{shared, common::shared_address(shared), p.tail_offset, int(blockIdx.x) / p.splits, rank, first_step,
                  steps};
    if (common::elect_one()) {  // each barrier is an instruction of some fifty cycles: every warp makes a few
        for (int i = warp; i < p.stages; i += threads(kForm) / 32) {
            common::mbarrier_init(b.full(i), 1);
            common::mbarrier_init(b.empty(i), 4 * Sums<kTokens, kRows>::kGroups);
        }
        if (warp == kConsumerWarps) {
            common::mbarrier_init(b.drained(), 4 * Sums<kTokens, kRows>::kGroups * p.splits);
            common::mbarrier_init(b.received(), 1);
        }
        common::fence_barrier_init();
    }
    __syncthreads();
    Producer<kTokens> producer{p, b, &weight, &x};
    if (warp == kConsumerWarps) {
        producer.begin();
        if (p.splits > 1 && common::elect_one()) common::mbarrier_expect(b.received(), sent_bytes<kTokens>(p, b));
        __syncwarp();
    }
    if (p.splits > 1) common::cluster_arrive();
    if (warp < kConsumerWarps) {
        consume<kTokens, kRows, kForm>(p, b);
    } else if (warp == kConsumerWarps) {
        producer.run();
        if (p.splits > 1) common::cluster_wait();
    } else if constexpr (has_norm(kForm)) {
        make_scales<kTokens>(p, b);
        if (p.splits > 1) common::cluster_wait();
    }
#else
    __trap();  // the host launches this on compute capability 9.0 only
#endif
}

}  // namespace batch_linear
