// y = x weight^T for few tokens, at the speed at which weights arrive from memory (sm_90a, bf16).
//
// The roles are swapped: rows of weight are the M of the tensor cores, tokens the N, so that 8 tokens cost no more than they
// must. A tile is up to 128 rows of weight. Blocks of a cluster share a tile and take a part of the inner dimension each, so
// that few rows still occupy every SM; or they take neighbouring tiles and load x once for all, because with 64 tokens the way
// from L2 is the bottleneck, not memory. A producer thread streams [tile_rows x 64] of weight and [tokens x 64] of x into a
// ring; two warpgroups multiply. If x is to be normed, they first multiply it by the norm's weight, in place, and gather its
// squares, while the tensor cores still work on the stage before; the scale 1 / rms is one number a token, so it waits for the
// epilogue. There the partial sums of the cluster are added in the order of its blocks (a repeat is bitwise equal) and leave
// as whole 16-byte chunks.
//
// weight [num_rows, size], x [num_tokens, size], out: see Epilogue; all contiguous bf16. weight and norm_weight are read before
// the previous kernel has ended: they must have been written by an earlier one.
#pragma once
#include <cuda_bf16.h>

#include "common/async.cuh"
#include "common/types.cuh"
#include "linear/cluster.cuh"
#include "linear/params.h"
#include "linear/wgmma.cuh"

namespace linear {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LINEAR_HAS_WGMMA 1
#else
#define LINEAR_HAS_WGMMA 0
#endif

// A place in the ring, and the parity of its current round.
struct Cursor {
    int stage = 0;
    uint32_t phase = 0;
    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// What every role of a block knows. It is part `split` of the inner dimension, steps first_step .. first_step + steps - 1, of
// tiles first_tile, first_tile + tile_stride, ...: `rounds` stages in all, as many as in each of its `sharers`, of which it is
// number `sharer`. The last tile may lie beyond the matrix: it reads as zero and is not stored.
struct Work {
    uint32_t base, barriers;  // shared addresses
    SharedLayout layout;
    int split, sharer, first_step, steps, first_tile, tile_stride, rounds;

    // A barrier a stage for each hand-over: copied, multiplied.
    __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return barriers + (kMaxStages + stage) * 8; }
};

template <int kTokens>
__device__ __forceinline__ void produce(const Params& p, const Work& w, const CUtensorMap& weight, const CUtensorMap& x) {
    const uint32_t bytes = w.layout.stage;
    const int tokens = kTokens / p.sharers;  // of x that this block loads, for itself and its sharers
    int blocks = 0;
    for (int i = 0; i < p.sharers; ++i) blocks |= 1 << (w.split + i * p.splits);
    const auto copy_weight = [&](int round, int stage) {
        common::mbarrier_expect(w.full(stage), bytes);
        copy_2d(w.base + stage * bytes, &weight, w.full(stage), (w.first_step + round % w.steps) * kInner,
                (w.first_tile + round / w.steps * w.tile_stride) * p.tile_rows, kEvictFirst);
    };
    const auto copy_x = [&](int round, int stage) {
        const uint32_t target = w.base + stage * bytes + (p.tile_rows + w.sharer * tokens) * kInner * 2;
        const int column = (w.first_step + round % w.steps) * kInner;
        if (p.sharers == 1) {
            copy_2d(target, &x, w.full(stage), column, 0, kEvictLast);
        } else {
            copy_2d_to_blocks(target, &x, w.full(stage), column, w.sharer * tokens, blocks, kEvictLast);
        }
    };
    const int ahead = min(p.stages, w.rounds);
    // Too early, and what the next kernel asks for in advance competes with this one; too late, and its launch is not hidden.
    const int trigger = max(w.rounds - p.trigger_before_end, ahead);
    for (int i = 0; i < ahead; ++i) copy_weight(i, i);
    common::wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) copy_x(i, i);
    Cursor cursor;
    for (int i = ahead; i < w.rounds; ++i) {
        if (i == trigger) common::allow_next_kernel();
        common::mbarrier_wait(w.empty(cursor.stage), cursor.phase);
        copy_weight(i, cursor.stage);
        copy_x(i, cursor.stage);
        cursor.advance(p.stages);
    }
    if (trigger >= w.rounds) common::allow_next_kernel();
}

// How a consumer thread norms x: chunk t % 8 of tokens t / 8, and of every 32nd after it.
template <int kTokens>
struct Norm {
    static constexpr int kStride = kConsumerThreads / 8, kPasses = (kTokens + kStride - 1) / kStride;
    static constexpr int kPassBytes = kStride * kInner * 2;
    const bool active;      // fewer tokens than kStride leave threads without work
    const int chunk;
    const uint32_t offset;  // of the first chunk in a stage's x; kStride is a multiple of 8, so that the swizzle repeats
    float squares[kPasses] = {};
    uint4 factors = {};     // of the step to come: asked for one step ahead

    __device__ explicit Norm(int thread)
        : active(thread / 8 < kTokens), chunk(thread % 8), offset(thread / 8 * kInner * 2 + ((thread ^ thread / 8) & 7) * 16) {}

    __device__ __forceinline__ void prefetch(const Params& p, int step) {
        const int column = step * kInner + chunk * 8;
        if (column < p.size) factors = __ldg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.norm_weight) + column));
    }

    // x: shared address of a stage's [kTokens x 64]. Ends with a barrier over the consumers.
    __device__ __forceinline__ void scale(uint32_t x, const Params& p, int next_step) {
        uint4 values[kPasses];
        if (active) {
#pragma unroll
            for (int i = 0; i < kPasses; ++i) values[i] = load_shared(x + offset + i * kPassBytes);
        }
        const uint4 mine = factors;
        prefetch(p, next_step);
        const __nv_bfloat162* weights = reinterpret_cast<const __nv_bfloat162*>(&mine);
        if (active) {
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&values[i]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 pair = __bfloat1622float2(pairs[j]);
                    squares[i] += pair.x * pair.x;
                    squares[i] += pair.y * pair.y;
                    pairs[j] = __hmul2(pairs[j], weights[j]);
                }
                store_shared(x + offset + i * kPassBytes, values[i]);
            }
        }
        fence_async_proxy();
        common::named_sync(1, kConsumerThreads);
    }

    // The block's part of each token's sum of squares, to `sums` in shared memory.
    __device__ __forceinline__ void store_sums(uint32_t sums, int thread) {
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            float sum = squares[i];
            for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (active && chunk == 0) {
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + (thread / 8 + i * kStride) * 4), "f"(sum) : "memory");
            }
        }
    }
};

// This warp has done with a stage: say so to every block that copies into it.
__device__ __forceinline__ void release(const Params& p, const Work& w, int stage) {
    const int lane = threadIdx.x % 32;
    if (p.sharers == 1) {
        if (lane == 0) common::mbarrier_arrive(w.empty(stage));
    } else if (lane < p.sharers) {
        arrive_in_block(in_block(w.empty(stage), w.split + lane * p.splits));
    }
}

// This warpgroup's 64 rows of the tile times all tokens, over the block's part of the inner dimension.
template <int kTokens, bool kNorm>
__device__ __forceinline__ void multiply(const Params& p, const Work& w, int group, Cursor& cursor, Norm<kTokens>& norm,
                                         float (&d)[kTokens / 2]) {
#if LINEAR_HAS_WGMMA
    const bool keep = w.rounds <= p.stages;  // everything fits in the ring: no stage is needed twice
    int previous = -1;
    for (int step = 0; step < w.steps; ++step) {
        common::mbarrier_wait(w.full(cursor.stage), cursor.phase);
        const uint32_t stage = w.base + cursor.stage * w.layout.stage, x = stage + p.tile_rows * kInner * 2;
        if (kNorm) norm.scale(x, p, w.first_step + (step + 1 < w.steps ? step + 1 : 0));
        // Rows beyond the tile are multiplied too, whatever lies there: a branch would keep the products from overlapping.
        const uint64_t a = operand(stage + group * 64 * kInner * 2), b = operand(x);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kInner / 16; ++k) wgmma(d, a + 2 * k, b + 2 * k, step + k > 0);  // 2: 16 elements are 32 bytes
        wgmma_commit();
        if (p.eager_release) {
            wgmma_wait<0>();
            if (!keep) release(p, w, cursor.stage);
        } else {
            wgmma_wait<1>();
            if (!keep && previous >= 0) release(p, w, previous);
            previous = cursor.stage;
        }
        cursor.advance(p.stages);
    }
    wgmma_wait<0>();
    if (!keep && previous >= 0) release(p, w, previous);
#endif
}

template <int kTokens>
__device__ __forceinline__ void store_partials(const Params& p, const Work& w, int thread, const float (&d)[kTokens / 2]) {
    const int row = thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4, token = 2 * (thread % 4);
    const uint32_t stride = w.layout.stride_partial * 4;
    uint32_t at = w.base + w.layout.partials + token * stride + row * 4;
    const auto store = [](uint32_t address, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory"); };
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 4, at += 8 * stride) {
        if (row < p.tile_rows) store(at, d[i]), store(at + stride, d[i + 1]);
        if (row + 8 < p.tile_rows) store(at + 32, d[i + 2]), store(at + stride + 32, d[i + 3]);
    }
}

// Eight neighbouring rows of one token, summed over the cluster in the order of its blocks, kBatch blocks' reads in flight
// together.
template <int kBatch>
__device__ __forceinline__ void sum_splits(uint32_t address, int first_block, int splits, float (&y)[8]) {
#pragma unroll
    for (float& sum : y) sum = 0;
#pragma unroll 1
    for (int first = 0; first < splits; first += kBatch) {
        float4 low[kBatch], high[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint32_t at = in_block(address, first_block + first + i);
            low[i] = load_float4(at), high[i] = load_float4(at + 16);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            y[0] += low[i].x, y[1] += low[i].y, y[2] += low[i].z, y[3] += low[i].w;
            y[4] += high[i].x, y[5] += high[i].y, y[6] += high[i].z, y[7] += high[i].w;
        }
    }
}

__device__ __forceinline__ uint4 pack(const float (&y)[8]) {
    using Pack = common::Pack<__nv_bfloat16>;
    return {Pack::from_floats(y[0], y[1]), Pack::from_floats(y[2], y[3]), Pack::from_floats(y[4], y[5]), Pack::from_floats(y[6], y[7])};
}

// The tile's (token, chunk of rows) pairs are shared out over the cluster and over the consumer threads.
template <int kBatch, bool kNorm, Epilogue kEpilogue>
__device__ __forceinline__ void finish_tile(const Params& p, const Work& w, int tile, int thread) {
    constexpr int kChunkRows = kEpilogue == Epilogue::kSwiGlu ? 16 : 8;
    const int chunks = p.tile_rows / kChunkRows, items = chunks * p.num_tokens;
    const int out_size = kEpilogue == Epilogue::kSwiGlu ? p.num_rows / 2 : p.num_rows;
    const int first_block = w.sharer * p.splits;
    const int begin = items * w.split / p.splits, end = items * (w.split + 1) / p.splits;
    for (int item = begin + thread; item < end; item += kConsumerThreads) {
        const int token = item / chunks, row = item % chunks * kChunkRows;
        if (tile * p.tile_rows + row >= p.num_rows) continue;
        const int64_t at = int64_t(token) * out_size + (tile * p.tile_rows + row) / (kChunkRows / 8);
        uint4 residual = {};
        if (kEpilogue == Epilogue::kAdd) residual = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.residual) + at);
        float scale = 1;
        if (kNorm) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < kMaxCluster; ++i) {
                if (i < p.splits) squares += load_float(in_block(w.base + w.layout.sums + token * 4, first_block + i));
            }
            scale = rsqrtf(squares / p.size + p.eps);
        }
        const uint32_t from = w.base + w.layout.partials + (token * w.layout.stride_partial + row) * 4;
        float y[8];
        sum_splits<kBatch>(from, first_block, p.splits, y);
        if (kEpilogue == Epilogue::kSwiGlu) {
            float up[8];
            sum_splits<kBatch>(from + 32, first_block, p.splits, up);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float gate = y[i] * scale;
                y[i] = __fdividef(gate, 1 + __expf(-gate)) * up[i] * scale;
            }
        } else {
            const __nv_bfloat162* added = reinterpret_cast<const __nv_bfloat162*>(&residual);
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const float2 pair = __bfloat1622float2(added[i / 2]);
                y[i] = y[i] * scale + pair.x, y[i + 1] = y[i + 1] * scale + pair.y;
            }
        }
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + at) = pack(y);
    }
}

template <int kTokens, bool kNorm, Epilogue kEpilogue>
__device__ __forceinline__ void consume(const Params& p, const Work& w, int thread) {
    Cursor cursor;
    Norm<kTokens> norm(thread);
    if (kNorm) norm.prefetch(p, w.first_step);
    common::wait_for_previous_kernel();
    for (int round = 0, tile = w.first_tile; round < w.rounds; round += w.steps, tile += w.tile_stride) {
        float d[kTokens / 2];
        multiply<kTokens, kNorm>(p, w, thread / 128, cursor, norm, d);
        // The other warpgroup may still read the stages that the partial sums will overwrite, or the last tile's sums.
        common::named_sync(2, kConsumerThreads);
        store_partials<kTokens>(p, w, thread, d);
        if (kNorm && tile == w.first_tile) norm.store_sums(w.base + w.layout.sums, thread);  // the same for every tile
        if (p.splits == 1) {
            common::named_sync(2, kConsumerThreads);
        } else {
            cluster_sync();  // one tile a cluster: the producer has exited, or will without a barrier
        }
        if (p.splits == 1 || kEpilogue == Epilogue::kSwiGlu) {  // whose registers hold no more at a time
            finish_tile<1, kNorm, kEpilogue>(p, w, tile, thread);
        } else if (p.splits == 2) {
            finish_tile<2, kNorm, kEpilogue>(p, w, tile, thread);
        } else {
            finish_tile<4, kNorm, kEpilogue>(p, w, tile, thread);
        }
    }
    if (p.splits * p.sharers > 1) cluster_sync();  // shared memory must outlive its readers, and barriers those who arrive
}

template <int kTokens, bool kNorm, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, kTokens <= 64 ? 2 : 1)
    skinny_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x, const __grid_constant__ Params p) {
#if LINEAR_HAS_WGMMA
    extern __shared__ uint8_t shared[];
    Work w;
    w.base = (common::shared_address(shared) + 1023) / 1024 * 1024;
    w.layout = SharedLayout::of(p.tile_rows, kTokens, p.stages, p.one_tile);
    w.barriers = w.base + w.layout.barriers;
    const int steps = (p.size + kInner - 1) / kInner;
    const int cluster = p.splits * p.sharers, rank = cluster > 1 ? cluster_rank() : 0;
    w.split = rank % p.splits, w.sharer = rank / p.splits;
    w.first_step = steps * w.split / p.splits;
    w.steps = steps * (w.split + 1) / p.splits - w.first_step;
    const int first = blockIdx.x / cluster * p.sharers;
    w.first_tile = first + w.sharer, w.tile_stride = gridDim.x / cluster * p.sharers;
    w.rounds = (p.tiles - first + w.tile_stride - 1) / w.tile_stride * w.steps;

    const int thread = threadIdx.x;
    if (thread == kConsumerThreads) {
        common::tma_prefetch_map(&weight), common::tma_prefetch_map(&x);
        for (int i = 0; i < p.stages; ++i) {
            common::mbarrier_init(w.full(i), 1);
            common::mbarrier_init(w.empty(i), kConsumerWarps * p.sharers);
        }
        common::fence_barrier_init();
    }
    __syncwarp();
    cluster > 1 ? cluster_sync() : __syncthreads();  // a sharer's copies may arrive at once
    if (thread < kConsumerThreads) {
        consume<kTokens, kNorm, kEpilogue>(p, w, thread);
    } else if (thread == kConsumerThreads) {
        produce<kTokens>(p, w, weight, x);
    }
#else
    __trap();  // the host launches this on compute capability 9.0 only
#endif
}

}  // namespace linear
