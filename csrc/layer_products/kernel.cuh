// All products between one layer's attention and the next one's, in one launch, for the tokens of a decode step
// (sm_90a, bf16): o, gate-up, down, and the next layer's qkv. Weights arrive at memory's rate across the borders
// between products.
//
// Grid: one block a multiprocessor. Of each product a block has an equal range of steps (params.h), so that all read
// equally much. One warp streams boxes of weight into a ring in shared memory, as far ahead as the ring holds, into the
// next product and before the previous kernel has ended, because weights are constants. Another adds the boxes of
// tokens: those wait until all blocks have finished the product before. Two warpgroups multiply, with weights as the
// tensor cores' rows and tokens as their columns, straight from shared memory. A norm's weight is multiplied into the
// output of the product before it; its scale, one number a token, waits for the epilogue (finish.cuh).
//
// Blocks wait for each other, so all must be on the GPU at once: at most one a multiprocessor.
#pragma once
#include <cuda.h>

#include "common/wgmma_shapes.cuh"
#include "layer_products/finish.cuh"

namespace layer_products {

using common::operand, common::wgmma, common::wgmma_commit, common::wgmma_fence, common::wgmma_wait;

__device__ __forceinline__ long long now() {
    long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
#define STAMP(k)                                                        \
    do {                                                                \
        if (p.clocks) p.clocks[(blockIdx.x * 4 + i) * 8 + (k)] = now(); \
    } while (0)
struct TensorMaps {
    CUtensorMap weight[kMaxProducts], tokens[kMaxProducts];
};

// One block's view.
struct Block {
    uint32_t base;  // shared address of the ring
    uint32_t tail;  // of Tail
    int index;
    __device__ uint32_t full(int stage) const { return tail + uint32_t(offsetof(Tail, full)) + stage * 8; }
    __device__ uint32_t empty(int stage) const { return tail + uint32_t(offsetof(Tail, empty)) + stage * 8; }
    __device__ Range range(const Product& q) const {
        return index < q.blocks ? Range::of(q.tiles * q.steps, index, q.blocks) : Range{0, 0};
    }
};

// A position in the ring. A fresh barrier's previous phase counts as complete: the first round does not wait.
struct Cursor {
    int stage = 0;
    uint32_t phase = 0;
    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}

template <int kTokens>
__device__ __forceinline__ void copy_weights(const Params& p, const TensorMaps& maps, const Block& b) {
    Cursor cursor;
    uint32_t phase = 1;
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
        const Product& q = p.products[i];
        const Range range = b.range(q);
        if (range.begin == range.end) continue;
        Pieces pieces(range, q.steps, b.index);
        int done = 0;
        do
            for (int step = pieces.begin - pieces.tile() * q.steps, at = pieces.begin; at < pieces.end;
                 ++at, ++step, ++done) {
                if (i == 0 && done == p.ahead_start) common::wait_for_previous_kernel();
                if (i > 0 && done == p.ahead) common::mbarrier_wait(b.tail + uint32_t(offsetof(Tail, finished)), phase);
                common::mbarrier_wait(b.empty(cursor.stage), cursor.phase ^ 1);
                common::mbarrier_expect(b.full(cursor.stage), kTileRows * kStageColumns * 2);
                copy_box(b.base + cursor.stage * stage_bytes(kTokens), &maps.weight[i], b.full(cursor.stage),
                         step * kStageColumns, pieces.tile() * kTileRows, common::kEvictFirst);
                cursor.advance(p.stages);
            }
        while (pieces.next());
        phase ^= 1;
    }
}

template <int kTokens>
__device__ __forceinline__ void copy_tokens(const Params& p, const TensorMaps& maps, const Block& b) {
    common::wait_for_previous_kernel();
    const uint32_t base = common::load_acquire(p.words + Words::kBase);
    uint32_t before = 0;  // arrivals at which the products before are finished
    Cursor cursor;
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
        const Product& q = p.products[i];
        const Range range = b.range(q);
        if (range.end > range.begin && i > 0) {
            common::wait_for_word(p.words + Words::kArrived, [&](uint32_t word) { return word - base >= before; });
            common::fence_async_proxy_global();
        }
        STAMP(0);
        if (range.end > range.begin && has_norm(q.form))
            common::mbarrier_arrive(b.tail + uint32_t(offsetof(Tail, ready)));
        before += q.blocks;
        if (range.begin == range.end) continue;
        Pieces pieces(range, q.steps, b.index);
        int left = range.end - range.begin;
        do
            for (int step = pieces.begin - pieces.tile() * q.steps, at = pieces.begin; at < pieces.end; ++at, ++step) {
                common::mbarrier_wait(b.empty(cursor.stage), cursor.phase ^ 1);
                common::mbarrier_expect(b.full(cursor.stage), kTokens * kStageColumns * 2);
                copy_box(b.base + cursor.stage * stage_bytes(kTokens) + kTileRows * kStageColumns * 2, &maps.tokens[i],
                         b.full(cursor.stage), step * kStageColumns, 0, common::kEvictLast);
                if (i == p.count - 1 && --left == min(p.trigger, range.end - range.begin - 1))
                    common::allow_next_kernel();
                cursor.advance(p.stages);
            }
        while (pieces.next());
    }
}

// The sums of a piece of `count` steps.
template <int kTokens>
__device__ __forceinline__ void multiply(float (&d)[kTokens / 2], const Params& p, const Block& b, int count,
                                         Cursor& cursor, int group, int lane, int i, bool is_first) {
    uint32_t before = 0;
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
        const uint32_t weight = b.base + cursor.stage * stage_bytes(kTokens);
        const uint64_t rows = operand(weight + group * (kTileRows / 2 * kStageColumns * 2));
        const uint64_t columns = operand(weight + kTileRows * kStageColumns * 2);
        common::mbarrier_wait(b.full(cursor.stage), cursor.phase);
        if (is_first && step == 0 && threadIdx.x == 0) STAMP(1);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStageColumns / 16; ++k)  // 32 bytes further along the rows
            wgmma<kTokens>(d, rows + 2 * k, columns + 2 * k, step + k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && lane == 0) common::mbarrier_arrive(before);
        before = b.empty(cursor.stage);
        cursor.advance(p.stages);
    }
    wgmma_wait<0>();
    if (lane == 0) common::mbarrier_arrive(before);
}

// One thread of kScaleThreads.
template <int kTokens>
__device__ __forceinline__ void find_scales(const Params& p, const Block& b, Tail& tail, int thread) {
    // With the rings full of requests, memory takes several microseconds for one more: what is small comes before.
    for (int i = 0; i < p.count; ++i)
        for (int line = b.index + thread * int(gridDim.x); line * 64 < p.products[i].num_rows;
             line += kScaleThreads * int(gridDim.x))
            if (p.products[i].norm) common::prefetch_l2(static_cast<const uint8_t*>(p.products[i].norm) + line * 128);
    uint32_t phase = 0;
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
        const Product& q = p.products[i];
        if (b.index >= q.blocks || !has_norm(q.form)) continue;
        common::mbarrier_wait(b.tail + uint32_t(offsetof(Tail, ready)), phase);
        Scales<kTokens>::find(p, q, tail, thread);
        common::mbarrier_arrive(b.tail + uint32_t(offsetof(Tail, scaled)));
        phase ^= 1;
    }
}

template <int kTokens>
__device__ __forceinline__ void consume(const Params& p, const Block& b, const Tail& tail, int warp, int lane) {
    common::wait_for_previous_kernel();
    uint32_t base = 0, all = 0;  // of one thread
    if (warp == 0 && lane == 0) {
        base = common::load_acquire(p.words + Words::kBase);
        for (int i = 0; i < p.count; ++i) all += p.products[i].blocks;
    }
    Cursor cursor;
    uint32_t phase = 0;
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
        const Product& q = p.products[i];
        const Range range = b.range(q);
        if (range.begin == range.end) continue;
        const Finisher<kTokens> finisher{p, q, tail, b.index};
        bool scaled = !has_norm(q.form);
        const auto wait_for_scales = [&] {
            if (scaled) return;
            common::mbarrier_wait(b.tail + uint32_t(offsetof(Tail, scaled)), phase);
            phase ^= 1;
            scaled = true;
        };
        // What memory has to give for the outputs should be in L2 by then.
        const int first = range.begin / q.steps, last = (range.end - 1) / q.steps;
        finisher.prefetch(first, warp, lane);
        if (last != first) finisher.prefetch(last, warp, lane);
        Pieces pieces(range, q.steps, b.index);
        const int shared = pieces.tile();  // to begin with
        bool open = false;                 // it is still to be collected
        bool is_first = true;
#pragma unroll 1
        do {
            float d[kTokens / 2];
            multiply<kTokens>(d, p, b, pieces.end - pieces.begin, cursor, warp / 4, lane, i, is_first);
            if (open && finisher.both_begin_with(shared)) {
                wait_for_scales();
                finisher.collect(shared, warp, lane);
                open = false;
            }
            if (pieces.is_whole()) {
                wait_for_scales();
                finisher.finish_whole(d, pieces.tile(), warp, lane);
            } else {
                finisher.publish(d, pieces.begin != range.begin, warp, lane);
                if (is_first) open = true;
            }
            is_first = false;
        } while (pieces.next());
        if (warp == 0 && lane == 0) STAMP(2);
        wait_for_scales();
        if (warp == 0 && lane == 0) STAMP(3);
        if (open) finisher.collect(shared, warp, lane);
        if (pieces.tile() != shared && !pieces.is_whole()) finisher.collect(pieces.tile(), warp, lane);
        if (warp == 0 && lane == 0) STAMP(4);
        common::named_sync(kFinishBarrier, kConsumers);
        if (warp == 0 && lane == 0) {
            STAMP(5);
            if (i < p.count - 1) {
                common::add_release(p.words + Words::kArrived, 1);
            } else {
                const uint32_t arrived = common::add_acq_rel(p.words + Words::kArrived, 1) + 1;
                if (arrived - base == all) p.words[Words::kBase] = arrived;  // all have read the old one
            }
            STAMP(6);
            common::mbarrier_arrive(b.tail + uint32_t(offsetof(Tail, finished)));
        }
    }
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    layer_products_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Params p) {
#if __CUDA_ARCH__ == 900
    extern __shared__ __align__(1024) uint8_t memory[];
    const int warp = common::uniform_warp(), lane = threadIdx.x % 32;
    Tail& tail = *reinterpret_cast<Tail*>(memory + p.stages * stage_bytes(kTokens));
    const Block b{common::shared_address(memory), common::shared_address(&tail), int(blockIdx.x)};
    if (common::elect_one()) {  // each barrier is an instruction of some fifty cycles: every warp makes a few
        for (int i = warp; i < p.stages; i += kThreads / 32) {
            common::mbarrier_init(b.full(i), 2);
            common::mbarrier_init(b.empty(i), kConsumerWarps);
        }
        if (warp == kConsumerWarps) {
            common::mbarrier_init(b.tail + uint32_t(offsetof(Tail, ready)), 1);
            common::mbarrier_init(b.tail + uint32_t(offsetof(Tail, finished)), 1);
            common::mbarrier_init(b.tail + uint32_t(offsetof(Tail, scaled)), kScaleThreads);
        }
        common::fence_barrier_init();
    }
    __syncthreads();
    if (warp < kConsumerWarps) {
        consume<kTokens>(p, b, tail, warp, lane);
    } else if (warp >= kConsumerWarps + 2) {
        find_scales<kTokens>(p, b, tail, int(threadIdx.x) - kConsumers - 2 * 32);
    } else if (common::elect_one()) {
        if (warp == kConsumerWarps)
            copy_weights<kTokens>(p, maps, b);
        else
            copy_tokens<kTokens>(p, maps, b);
    }
#else
    __trap();  // the host launches this on compute capability 9.0 only
#endif
}

}  // namespace layer_products
