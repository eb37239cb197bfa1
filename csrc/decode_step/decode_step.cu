// A whole decode step of batch 1 in one kernel, or several steps in a row.
//
// Grid: one block a multiprocessor, all resident at once (cooperative launch). Block: 8 math warps, one epilogue warp,
// one loader thread. Every block owns some rows of every projection. Blocks exchange activations as tagged words
// (packet.cuh); there is no other synchronisation between them, and nothing is ever reset.
//
//   loader    weights and cached k, v, in the order of use, into the ring         never waits for an activation
//   math      await x; multiply chunks; partial rows to shared memory             per layer: qkv, attention, o,
//   gate-up, down epilogue  sum partial rows; norm scale, residual, silu, argmax; publish
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

// A block's rows of one projection as bytes.
struct Slab {
    const char* source;
    int bytes;
};

__device__ __forceinline__ Slab slab_of(const Params& p, const LayerPointers* layers, int op, int layer) {
    const Rows rows = rows_of_block(p.linear[op], op, layer, blockIdx.x, gridDim.x);
    const int row_bytes = p.linear[op].k * 2;
    return {
        reinterpret_cast<const char*>(weight_of(p, layers, op, layer)) + static_cast<int64_t>(rows.begin) * row_bytes,
        rows.count * row_bytes};
}

// Brings weights into L2 that the ring has no room for yet, at the pace of memory, so that memory does not rest while
// the blocks wait for each other. It walks the same slabs as the loader, `lead` bytes ahead of it.
struct Prefetcher {
    const Params& p;
    const LayerPointers* layers;
    int item = -1, lead = 0;
    Slab left{nullptr, 0};
    uint32_t last = 0;

    __device__ __forceinline__ void advance(int bytes) {
        while (bytes >= left.bytes && !done()) {
            bytes -= left.bytes;
            ++item;
            const int in_step = item % (4 * p.num_layers + 1), layer = in_step >> 2;
            if (!done())
                left = slab_of(p, layers, layer == p.num_layers ? static_cast<int>(kHead) : in_step & 3, layer);
        }
        left.source += bytes;
        left.bytes -= bytes;
    }
    __device__ __forceinline__ bool done() const { return item >= p.num_steps * (4 * p.num_layers + 1); }

    // The loader has requested the next `bytes`.
    __device__ __forceinline__ void passed(int bytes) {
        const int beyond = max(bytes - lead, 0);
        lead -= bytes - beyond;
        if (beyond > 0) advance(beyond);
    }
    __device__ __forceinline__ void idle(bool ring_is_full) {
        constexpr int kPiece = 16 * 1024;
        if (lead >= p.max_prefetch || !(ring_is_full || lead > 0) || done()) return;
        const uint32_t now = clock();
        if (now - last < p.prefetch_cycles) return;
        last = now;
        if (left.bytes == 0) advance(0);
        const int bytes = min(left.bytes, kPiece);
        if (bytes == 0) return;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(left.source), "r"(bytes) : "memory");
        lead += bytes;
        advance(bytes);
    }
};

template <typename Idle>
__device__ __forceinline__ void load_rows(const Params& p, const LayerPointers* layers, int op, int layer,
                                          RingLoader& ring, Prefetcher& ahead, Idle&& idle) {
    const int chunk_bytes = p.linear[op].chunk_rows * p.linear[op].k * 2;
    Slab slab = slab_of(p, layers, op, layer);
    for (; slab.bytes > 0; slab.source += chunk_bytes, slab.bytes -= chunk_bytes) {
        const int bytes = min(chunk_bytes, slab.bytes);
        ring.push(slab.source, bytes, chunk_bytes, idle);
        ahead.passed(bytes);
        ahead.idle(false);
    }
}

template <int D, typename Idle>
__device__ __forceinline__ void load_context(const Params& p, const Step& step, int layer, int64_t first_block,
                                             RingLoader& ring, Idle&& idle) {
    const AttentionWork work = attention_of_block(p, step.position, blockIdx.x);
    constexpr uint32_t kTileBytes = kTileTokens * D * 2;
    for (int tile = work.tile_begin; tile < work.tile_end; ++tile) {
        const int64_t source =
            layer * p.stride_cache_layer + ((first_block + tile) * p.num_kv_heads + work.head) * (kTileTokens * D);
        const uint32_t bytes = min(kTileTokens, step.position - tile * kTileTokens) * D * 2;
        ring.push(p.k_cache + source, bytes, kTileBytes, idle);
        ring.push(p.v_cache + source, bytes, kTileBytes, idle);
    }
}

template <int D>
__device__ __forceinline__ void run_loader(const Params& p, const SharedState& shared, const LayerPointers* layers,
                                           RingLoader ring) {
    const int64_t first_block = static_cast<int64_t>(*p.slot) * p.blocks_per_slot;
    Prefetcher ahead{p, layers};
    const auto idle = [&ahead](bool ring_is_full) { ahead.idle(ring_is_full); };
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
        // The ring's barriers order this after the previous step's layers on this block, and these fences carry what
        // the other blocks then appended to the cache over to the copy engine.
        __threadfence();
        asm volatile("fence.proxy.async.global;" ::: "memory");
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            if (op == kO) load_context<D>(p, step, layer, first_block, ring, idle);
            load_rows(p, layers, op, layer, ring, ahead, idle);
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
    for (int i = threadIdx.x; i < 32; i += kThreads) shared.profile[i] = 0;
    for (int i = threadIdx.x; i < p.num_layers * int(sizeof(LayerPointers) / 8); i += kThreads)
        reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(p.layers)[i];
    __syncthreads();

    const int warp = threadIdx.x / 32;
    const uint32_t full = common::shared_address(shared.ring.full), empty = common::shared_address(shared.ring.empty);
    const uint32_t size = p.ring_bytes;
    PROFILE_BEGIN(kernel_began);
    // Registers move from the helpers' warp group to the math warps' two: 128 * 88 + 256 * 208 = 384 * 168.
    if (warp < kMathWarps) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        run_math<D, GP>(p, layers, RingReader{common::shared_address(ring), full, empty, size}, after, warp,
                        pinned(threadIdx.x % 32), shared);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == kEpilogueWarp) run_epilogue(p, pinned(threadIdx.x % 32), shared);
        if (threadIdx.x == kLoaderWarp * 32)
            run_loader<D>(
                p, shared, layers,
                RingLoader{common::shared_address(ring), full, empty, size, uint32_t(p.max_streaming),
                           uint32_t(p.max_exchanging), shared.ring.began, &shared.ring.exchanging, shared.profile});
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
    if (head_dim == 64 && padded == 4) return reinterpret_cast<const void*>(decode_step_kernel<64, 4>);
    if (head_dim == 64 && padded == 8) return reinterpret_cast<const void*>(decode_step_kernel<64, 8>);
    if (head_dim == 128 && padded == 4) return reinterpret_cast<const void*>(decode_step_kernel<128, 4>);
    throw std::runtime_error("decode_step: no kernel for head_dim " + std::to_string(head_dim) + ", group " +
                             std::to_string(group));
}

void launch(Params params, int head_dim, int grid, int max_smem_bytes, void* stream) {
    const int group = params.num_heads / params.num_kv_heads;
    const int available = max_smem_bytes - fixed_smem_bytes(params.num_layers, head_dim, group);
    params.ring_bytes =
        params.ring_bytes > 0 && params.ring_bytes < available ? params.ring_bytes : available / 128 * 128;
    const void* kernel = kernel_for(head_dim, group);
    const int smem_bytes = max_smem_bytes - available + params.ring_bytes;
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
    void* arguments[] = {&params};
    CHECK_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(grid), dim3(kThreads), arguments, smem_bytes,
                                           static_cast<cudaStream_t>(stream)));
}

}  // namespace decode_step
