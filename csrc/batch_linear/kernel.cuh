// y = x weight^T for the tokens of one decode step, up to 128, at the speed at which weights arrive from memory
// (sm_90a, bf16).
//
// A cluster of `splits` blocks makes a tile of up to 256 weight rows for all tokens, each block over its part of the
// inner dimension. One thread of a block streams boxes of weight and of x into a ring in shared memory, and asks for
// weight before the previous kernel has ended, because weights are constants: with half of an SM's shared memory each,
// this kernel's ring fills while the previous kernel's blocks still work. Up to two warpgroups multiply, straight from
// shared memory. RMSNorm costs no pass over x: its weight is part of `weight`, the product that makes x leaves sums of
// its squares, and the one behind scales its own. The head, kLinear, has so many rows that there is a block for each
// SM, which makes an equal share of them, tile by tile.
//
// weight [num_rows, size], x [num_tokens, size], out [num_tokens, num_rows] (see Params); all contiguous bf16. weight
// is read before the previous kernel has ended: it must have been written by an earlier one.
#pragma once
#include "batch_linear/fill.cuh"
#include "batch_linear/finish.cuh"
#include "batch_linear/multiply.cuh"
#include "batch_linear/scale.cuh"

namespace batch_linear {

using common::wgmma_commit, common::wgmma_wait;

// Which stages come next.
struct Turn {
    Cursor weight, x;
};

// Multiplies a tile's steps and calls after(step) behind each. A stage is given back when the next one is under way;
// the last one is returned, and multiplied.
template <int kTokens, int kRows, typename After>
__device__ __forceinline__ int multiply_steps(const Params& p, const Block& b, Sums<kTokens, kRows>& sums, int steps,
                                              Turn& turn, After after) {
    constexpr int kXBytes = stage_panels(kTokens, kRows) * panel_bytes(kTokens);
    const int lane = threadIdx.x % 32;
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        common::mbarrier_wait(b.full(turn.weight.stage), turn.weight.phase);
        sums.multiply(p, b.base + turn.weight.stage * p.weight_bytes, b.base + p.x_offset + turn.x.stage * kXBytes,
                      step);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && lane == 0) common::mbarrier_arrive(b.empty(before));
        after(step);
        before = turn.weight.stage;
        turn.weight.advance(p.stages), turn.x.advance(p.x_stages);
    }
    wgmma_wait<0>();
    return before;
}

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
        Turn turn;
        multiply_steps<kTokens, kRows>(p, b, sums, b.steps, turn, [&](int step) {
            if (step == last_step + 1) allow_sending(p, b, lane);
        });
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

// Tile after tile, while the ring runs on.
template <int kTokens, int kRows, Form kForm>
__device__ __forceinline__ void consume_tiles(const Params& p, const Block& b) {
    const int lane = threadIdx.x % 32;
    common::wait_for_previous_kernel();
    Sums<kTokens, kRows> sums(p);
    Turn turn;
#pragma unroll 1
    for (int first = 0; first < b.rows; first += kRows) {
        const int last = multiply_steps<kTokens, kRows>(p, b, sums, p.steps, turn, [](int) {});
        if (lane == 0) common::mbarrier_arrive(b.empty(last));
        sums.each(min(b.rows - first, kRows) / kUnitRows, [&](int unit, int part, const float* d) {
            const Target<kForm, tokens_are_rows(kTokens)> to(b.first_row + first + unit * kUnitRows, part, lane);
            to.write(p, b, d, {});
        });
    }
}

// Which rows of weight the block makes, and in which steps.
template <int kRows, Form kForm>
__device__ __forceinline__ Block block_of(const Params& p, uint8_t* shared, int rank) {
    Block b{shared, common::uniform(common::shared_address(shared)), p.tail_offset};
    if constexpr (makes_many_tiles(kForm)) {
        const int boxes = (p.num_rows + kBoxRows - 1) / kBoxRows, first = first_of(boxes, blockIdx.x, gridDim.x);
        b.first_row = first * kBoxRows, b.rows = first_of(boxes, blockIdx.x + 1, gridDim.x) * kBoxRows - b.first_row;
        b.steps = (b.rows + kRows - 1) / kRows * p.steps;
    } else {
        b.first_row = int(blockIdx.x) / p.splits * p.tile_rows, b.rows = p.tile_rows;
        b.rank = rank, b.first_step = first_of(p.steps, rank, p.splits);
        b.steps = first_of(p.steps, rank + 1, p.splits) - b.first_step;
    }
    return b;
}

// Registers for two blocks an SM, this kernel's and the next one's, where their rings may leave room for both: not of
// forms whose tiles may be tall.
template <Form kForm>
constexpr bool leaves_room(int tokens) {
    return tokens <= 64 && !may_be_tall(kForm, tokens);
}

template <int kTokens, int kRows, Form kForm>
__global__ void __launch_bounds__(threads(kForm), leaves_room<kForm>(kTokens) ? 2 : 1)
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
    const Block b = block_of<kRows, kForm>(p, shared, rank);
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
    Producer<kTokens, kRows, kForm> producer{p, b, &weight, &x};
    if (warp == kConsumerWarps) {
        producer.begin();
        if (p.splits > 1 && common::elect_one()) common::mbarrier_expect(b.received(), sent_bytes<kTokens>(p, b));
        __syncwarp();
    }
    if (p.splits > 1) common::cluster_arrive();
    if (warp < kConsumerWarps) {
        if constexpr (makes_many_tiles(kForm))
            consume_tiles<kTokens, kRows, kForm>(p, b);
        else
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
