// y = x weight^T for up to 32 tokens, at the speed at which weights arrive from memory (sm_90, bf16).
//
// A cluster of `splits` blocks makes tiles of `tile_rows` rows of weight, each block over its part of the inner
// dimension. One thread of a block streams boxes of weight and of x into a ring in shared memory, and asks for
// weight before the previous kernel has ended, because weights are constants: with half of an SM's shared memory each,
// this kernel's ring fills while the previous kernel's blocks still work. Eight warps multiply.
// The weight of a norm before the product is part of `weight`; its scale, one number a token, waits for the epilogue.
//
// weight [num_rows, size], x [num_tokens, size], out [num_tokens, num_rows] (see Params); all contiguous bf16. weight
// is read before the previous kernel has ended: it must have been written by an earlier one.
#pragma once
#include "skinny_linear/finish.cuh"

namespace skinny_linear {

using common::Cursor;

// The warp that fills the ring: one lane of it copies. begin() asks for constants only.
template <class Grid>
struct Producer {
    const Params& p;
    const Block& b;
    const CUtensorMap *weight, *x;
    int tile, step = 0, remaining;  // what to copy next, and how many stages are left

    __device__ Producer(const Params& p, const Block& b, const CUtensorMap* weight, const CUtensorMap* x)
        : p(p), b(b), weight(weight), x(x), tile(blockIdx.x / p.splits) {
        const int stride = gridDim.x / p.splits;
        remaining = (p.tiles - tile + stride - 1) / stride * b.steps;
    }

    __device__ __forceinline__ void copy_weight(int stage) {
        if (!common::elect_one()) return;
        common::mbarrier_expect(b.full(stage), b.layout.stage);
        common::tma_load_panels(b.base + stage * b.layout.stage, weight, b.full(stage), tile * p.tile_rows,
                                (b.first_step + step) * Grid::kBoxes, common::kEvictFirst);
    }
    __device__ __forceinline__ void copy_x(int stage, int step) {
        if (!common::elect_one()) return;
        common::tma_load_panels(b.base + stage * b.layout.stage + b.layout.stage_weight, x, b.full(stage), 0,
                                (b.first_step + step) * Grid::kBoxes, common::kEvictLast);
    }
    __device__ __forceinline__ void advance() {
        --remaining;
        if (++step == b.steps) step = 0, tile += gridDim.x / p.splits;
    }

    __device__ __forceinline__ int begin() {
        const int ahead = min(p.ahead, remaining);
#pragma unroll 1
        for (int stage = 0; stage < ahead; ++stage, advance()) copy_weight(stage);
        return ahead;
    }
    // The next kernel's weights should be on their way when this one's have been asked for: not before, because they
    // would only delay each other, and not after, because memory would rest.
    __device__ __forceinline__ void run(int ahead) {
        common::wait_for_previous_kernel();
        const int first = min(p.stages, ahead + remaining);
        if (ahead + remaining - first <= p.trigger) common::allow_next_kernel();
#pragma unroll 1
        for (int stage = 0, of_tile = 0; stage < first; ++stage, of_tile = of_tile + 1 < b.steps ? of_tile + 1 : 0) {
            if (stage >= ahead) copy_weight(stage), advance();
            copy_x(stage, of_tile);
        }
        Cursor cursor;
#pragma unroll 1
        for (; remaining > 0; cursor.advance(p.stages)) {
            common::mbarrier_wait(b.empty(cursor.stage), cursor.phase);
            copy_weight(cursor.stage);
            copy_x(cursor.stage, step);
            advance();
            if (remaining == p.trigger) common::allow_next_kernel();
        }
    }
};

// What a consumer thread works on.
template <class Grid>
struct WarpPlace {
    int lane, row_warp, token_warp, column_warp;
    static __device__ __forceinline__ WarpPlace of(int thread) {
        const int warp = thread / 32;
        return {thread % 32, warp % Grid::kRowWarps, warp / Grid::kRowWarps % Grid::kTokenWarps,
                warp / (Grid::kRowWarps * Grid::kTokenWarps)};
    }
};

// threadIdx.x, read anew: what follows from it need not stay in registers during the product.
__device__ __forceinline__ int thread_again() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

template <class Grid, int kTokenTiles, Form kForm>
__device__ __forceinline__ void consume(const Params& p, const Block& b) {
    constexpr bool kNorm = has_norm(kForm);
    constexpr int kTokens = kTokenTiles * 8, kWarpTokens = kTokens / Grid::kTokenWarps;
    const int thread = threadIdx.x;
    const auto [lane, row_warp, token_warp, column_warp] = WarpPlace<Grid>::of(thread);
    const int box = column_warp * Grid::kChunks / 2, half = column_warp * Grid::kChunks % 2;
    // A tile of fewer rows than its warps take: they multiply what lies behind it, and store nothing of that.
    const uint32_t weight = b.base + (box * p.tile_rows + row_warp * Grid::kRowTiles * 16) * kRowBytes +
                            (weight_offset(lane) ^ (half * 64));
    const uint32_t x = b.base + b.layout.stage_weight + (box * kTokens + token_warp * kWarpTokens) * kRowBytes +
                       (token_offset(lane) ^ (half * 64));
    common::wait_for_previous_kernel();

    Cursor cursor;
    const int stride = gridDim.x / p.splits;
#pragma unroll 1
    for (int tile = blockIdx.x / p.splits; tile < p.tiles; tile += stride) {
        const uint4 residual =
            load_residual<kForm>(p, Item<kForm, kTokens>(p, threadIdx.x, b.rank)
                                        .index(p, tile));  // asked for before the product, used behind it
        Accumulator<Grid, kWarpTokens / 8, kNorm> accumulator;
        accumulator.clear();
#pragma unroll 1
        for (int left = b.steps; left > 0; --left) {
            common::mbarrier_wait(b.full(cursor.stage), cursor.phase);
            const uint32_t offset = cursor.stage * b.layout.stage;
#pragma unroll
            for (int chunk = 0; chunk < Grid::kChunks; ++chunk) {
                const uint32_t other_half = chunk * 64;
                accumulator.add((weight + offset) ^ other_half, (x + offset) ^ other_half);
            }
            common::release_stage_behind(b.empty(cursor.stage), lane, accumulator.all_bits());
            cursor.advance(p.stages);
        }
        common::named_sync(1, kConsumers);  // the ring, or the previous tile's sums, are no longer read
        const WarpPlace<Grid> late = WarpPlace<Grid>::of(thread_again());
        const int stripe = late.column_warp * kTokens + late.token_warp * kWarpTokens;
        accumulator.store(b.at<float>(b.layout.partials) + stripe * b.layout.stride_partial, b.layout.stride_partial,
                          p.tile_rows, late.row_warp, late.lane);
        if constexpr (kNorm)
            accumulator.store_squares(b.at<float>(b.layout.squares) + stripe, late.row_warp, late.lane);
        common::named_sync(1, kConsumers);
        finish_tile<kForm, Grid::kColumnWarps, kTokens>(p, b, tile, residual);
    }
}

// Two blocks an SM: this kernel's and the next one's.
template <class Grid, int kTokenTiles, Form kForm>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x,
                  const __grid_constant__ Params p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) uint8_t shared[];
    const int warp = common::uniform_warp(), rank = p.splits > 1 ? common::cluster_rank() : 0;
    // Asked for now, or the first x would wait for its map.
    if (warp == kConsumerWarps && common::elect_one()) {
        common::tma_prefetch_map(&weight);
        common::tma_prefetch_map(&x);
    }
    const int first_step = p.steps * rank / p.splits, steps = p.steps * (rank + 1) / p.splits - first_step;
    const Block b{shared, common::shared_address(shared), p.layout, rank, first_step, steps};
    if (common::elect_one()) {  // each barrier is an instruction of some fifty cycles: every warp makes a few
#pragma unroll 1
        for (int stage = warp; stage < p.stages; stage += kThreads / 32) {
            common::mbarrier_init(b.full(stage), 1);
            common::mbarrier_init(b.empty(stage), kConsumerWarps);
        }
        if (warp == kConsumerWarps) common::mbarrier_init(b.sent(), 1);
        common::fence_barrier_init();
    }
    __syncthreads();
    const auto sync_cluster = [&] {  // before other blocks send
        if (p.splits == 1) return;
        common::cluster_arrive();
        common::cluster_wait();
    };
    if (warp < kConsumerWarps) {
        sync_cluster();
        consume<Grid, kTokenTiles, kForm>(p, b);
        return;
    }
    Producer<Grid> producer(p, b, &weight, &x);
    const int ahead = producer.begin();
    if (p.splits > 1 && common::elect_one()) common::mbarrier_expect(b.sent(), sent_bytes<kForm>(p, rank));
    __syncwarp();
    sync_cluster();
    producer.run(ahead);
#else
    __trap();  // the host launches this on compute capability 9.0 only
#endif
}

}  // namespace skinny_linear
