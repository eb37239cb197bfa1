// A whole decode step of batch 1 in one kernel, or several steps in a row.
//
// Grid: one block a multiprocessor, all resident at once (cooperative launch). Block: 8 math warps, one epilogue warp,
// three loader threads. Every block owns some rows of every projection. Blocks exchange activations as tagged words
// (packet.cuh); there is no other synchronisation between them, and nothing is ever reset.
//
//   loaders   weights and cached k, v, in the order of use, into the ring         never waits for an activation
//   math      await x; multiply chunks; partial rows to shared memory             per layer: qkv, attention, o,
//   gate-up, down epilogue  sum partial rows; norm scale, residual, silu, argmax; publish
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda_check.h"
#include "decode_step/attention.cuh"
#include "decode_step/epilogue.cuh"

namespace decode_step {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

__device__ __forceinline__ const bf16* weight_of(const Params& p, const LayerPointers* layers, int op, int layer) {
    switch (op) {
        case kQkv:
            return layers[layer].qkv;
        case kO:
            return layers[layer].o;
        case kGateUp:
            return layers[layer].gate_up;
        case kDown:
            return layers[layer].down;
        default:
            return p.lm_head;
    }
}

__device__ __forceinline__ void load_rows(const Params& p, const LayerPointers* layers, int op, int layer,
                                          RingLoader& loader) {
    const Linear& linear = p.linear[op];
    const Rows rows = rows_of_block(linear, op, layer, blockIdx.x, gridDim.x);
    const uint32_t row_bytes = linear.k * 2, chunk_bytes = linear.chunk_rows * row_bytes,
                   bytes = rows.count * row_bytes;
    const char* source =
        reinterpret_cast<const char*>(weight_of(p, layers, op, layer)) + static_cast<int64_t>(rows.begin) * row_bytes;
    loader.run((rows.count + linear.chunk_rows - 1) / linear.chunk_rows,
               [=](uint32_t c, uint32_t target, uint32_t barrier) {
                   const uint32_t begin = c * chunk_bytes, size = min(chunk_bytes, bytes - begin);
                   common::mbarrier_expect(barrier, size);
                   copy_in(target, source + begin, size, barrier);
               });
}

template <int D>
__device__ __forceinline__ void load_context(const Params& p, const Step& step, int layer, int64_t first_block,
                                             RingLoader& loader) {
    const AttentionWork work = attention_of_block(p, step.position, blockIdx.x);
    constexpr int kTileBytes = kTileTokens * D * 2, kTiles = tiles_per_chunk(D);
    const auto cached_bytes = [&](int tile) {  // 0 where only the new token is in the tile
        return tile < work.tile_end ? min(kTileTokens, step.position - tile * kTileTokens) * (D * 2) : 0;
    };
    loader.run(
        (work.tile_end - work.tile_begin + kTiles - 1) / kTiles, [&](uint32_t c, uint32_t target, uint32_t barrier) {
            const int first = work.tile_begin + static_cast<int>(c) * kTiles;
            int total = 0;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) total += 2 * cached_bytes(first + t);
            common::mbarrier_expect(barrier, total);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                const int bytes = cached_bytes(first + t);
                if (bytes == 0) continue;
                const int64_t source = layer * p.stride_cache_layer +
                                       ((first_block + first + t) * p.num_kv_heads + work.head) * (kTileTokens * D);
                copy_in(target + 2 * t * kTileBytes, p.k_cache + source, bytes, barrier);
                copy_in(target + (2 * t + 1) * kTileBytes, p.v_cache + source, bytes, barrier);
            }
        });
}

template <int D>
__device__ __forceinline__ void run_loader(const Params& p, const SharedState& shared, const LayerPointers* layers,
                                           RingLoader loader) {
    const int64_t first_block = static_cast<int64_t>(*p.slot) * p.blocks_per_slot;
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
        // The ring's barriers order this after the previous step's layers on this block, and these fences carry what
        // the other blocks then appended to the cache over to the copy engine.
        __threadfence();
        asm volatile("fence.proxy.async.global;" ::: "memory");
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            if (op == kO) load_context<D>(p, step, layer, first_block, loader);
            load_rows(p, layers, op, layer, loader);
        }
    }
}

__device__ __forceinline__ GemvInput input_of(const Params& p, const LayerPointers* layers, int op, int layer,
                                              const Step& step, int token) {
    const uint32_t use = step.first_use + layer;
    switch (op) {
        case kQkv:
            if (layer == 0)
                return {nullptr, 0, p.embed + static_cast<int64_t>(token) * p.hidden_size, layers[0].attn_norm};
            return {p.x_attn, use - 1, nullptr, layers[layer].attn_norm};
        case kO:
            return {p.attn, use, nullptr, nullptr};
        case kGateUp:
            return {p.x_mlp, use, nullptr, layers[layer].mlp_norm};
        case kDown:
            return {p.act, use, nullptr, nullptr};
        default:
            return {p.x_attn, use - 1, nullptr, p.final_norm};
    }
}

template <int D, int GP>
__device__ __forceinline__ void run_math(const Params& p, const LayerPointers* layers, RingReader ring,
                                         unsigned char* scratch, int warp, int lane, SharedState& shared) {
    uint32_t batch_count = 0;
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
        const int token = index == 0 ? static_cast<int>(*p.token_id) : drawn_token(p, step.number - 1);
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            if (op == kO) attention<D, GP>(p, step, layer, warp, lane, ring, scratch, shared);
            const Linear& linear = p.linear[op];
            const int rows = rows_of_block(linear, op, layer, blockIdx.x, gridDim.x).count;
            if (rows == 0) continue;
            const GemvInput in = input_of(p, layers, op, layer, step, token);
            switch (linear.units) {
#define GEMV(U)                                                                                  \
    case U:                                                                                      \
        gemv<U>(linear, op, in, rows, p.exchange_chunks, warp, lane, ring, batch_count, shared); \
        break;
                GEMV(1) GEMV(2) GEMV(3) GEMV(4) GEMV(7)  // kUnitChoices
#undef GEMV
            }
        }
    }
}

#endif

template <int D, int GP>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char memory[];
    SharedState& shared = *reinterpret_cast<SharedState*>(memory);
    unsigned char* after = memory + align_up(sizeof(SharedState));
    LayerPointers* layers = reinterpret_cast<LayerPointers*>(after + attention_scratch_bytes(D, GP));
    unsigned char* ring = reinterpret_cast<unsigned char*>(layers) + align_up(p.num_layers * sizeof(LayerPointers));

    const int position = *p.position;
    if (position < 0 || position + p.num_steps > p.max_positions) return;  // the same on every block

    if (threadIdx.x == 0) {
        shared.position = position;
        shared.steps_done = *p.steps_done;
        shared.ring.exchanging = 0;
        for (int i = 0; i < kRingSlots; ++i) {
            common::mbarrier_init(common::shared_address(&shared.ring.full[i]), 1);
            common::mbarrier_init(common::shared_address(&shared.ring.empty[i]), kMathWarps);
        }
        for (int i = 0; i < kBatchBuffers; ++i) {
            common::mbarrier_init(common::shared_address(&shared.batch_full[i]), kMathWarps);
            common::mbarrier_init(common::shared_address(&shared.batch_empty[i]), 1);
        }
        common::fence_barrier_init();
    }
    if (threadIdx.x < 32) shared.profile[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < p.num_layers * int(sizeof(LayerPointers) / 8); i += kThreads)
        reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
    __syncthreads();

    const int warp = threadIdx.x / 32;
    // Worked out in each role: what is worked out before them has to be kept in the registers that all roles have.
    const auto view = [&] {
        const uint32_t base = pinned(common::shared_address(memory));
        const auto at = [&](const void* p) {
            return base + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - memory);
        };
        return Ring{at(ring), at(shared.ring.full), at(shared.ring.empty), static_cast<uint32_t>(p.num_slots),
                    static_cast<uint32_t>(p.slot_bytes)};
    };
    PROFILE_BEGIN(kernel_began);
    // Registers move from the helpers' warp group to the math warps' two: 128 * 88 + 256 * 208 = 384 * 168.
    if (warp < kMathWarps) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        run_math<D, GP>(p, layers, RingReader{view()}, after, warp, pinned(threadIdx.x % 32), shared);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == kEpilogueWarp) {
            run_epilogue(p, pinned(threadIdx.x % 32), shared);
        } else if (threadIdx.x % 32 == 0) {
            run_loader<D>(
                p, shared, layers,
                RingLoader(view(), &shared.ring.exchanging, p.max_streaming, p.max_exchanging, warp - kLoaderWarp));
        }
    }
#ifdef DECODE_STEP_PROFILE
    if (warp == 0) PROFILE_END(shared, 21, kernel_began);
    __syncthreads();
    if (threadIdx.x < 32) p.profile[blockIdx.x * 32 + threadIdx.x] = shared.profile[threadIdx.x];
#endif
#endif
}

// Query heads of one kv head, padded to what kernels are built for.
static int padded_group(const int group) {
    return group > 4 ? 8 : 4;
}

int fixed_smem_bytes(int num_layers, int head_dim, int group) {
    return align_up(sizeof(SharedState)) + attention_scratch_bytes(head_dim, padded_group(group)) +
           align_up(num_layers * sizeof(LayerPointers));
}

static const void* kernel_for(int head_dim, int group) {
    const int padded = padded_group(group);
#define KERNEL(D, GP) \
    if (head_dim == D && padded == GP) return reinterpret_cast<const void*>(decode_step_kernel<D, GP>);
    KERNEL(64, 4)
    KERNEL(128, 4) KERNEL(64, 8) KERNEL(128, 8)
#undef KERNEL
        throw std::runtime_error("decode_step: no kernel for head_dim " + std::to_string(head_dim) + ", group " +
                                 std::to_string(group));
}

void launch(Params params, int head_dim, int grid, int max_smem_bytes, void* stream) {
    const int group = params.num_heads / params.num_kv_heads;
    params.slot_bytes = kContextChunkBytes;
    for (const Linear& linear : params.linear)
        params.slot_bytes = std::max(params.slot_bytes, linear.chunk_rows * linear.k * 2);
    const int fixed_bytes = fixed_smem_bytes(params.num_layers, head_dim, group);
    params.num_slots = std::min(kRingSlots, (max_smem_bytes - fixed_bytes) / params.slot_bytes);
    if (params.num_slots < 3) throw std::runtime_error("decode_step: too little shared memory for a ring of weights");
    const void* kernel = kernel_for(head_dim, group);
    const int smem_bytes = fixed_bytes + params.num_slots * params.slot_bytes;
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
    void* arguments[] = {&params};
    CHECK_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(grid), dim3(kThreads), arguments, smem_bytes,
                                           static_cast<cudaStream_t>(stream)));
}

}  // namespace decode_step
