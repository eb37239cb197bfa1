// A whole decode step of batch 1 in one kernel, or several steps in a row.
//
// Grid: one block a multiprocessor, all resident at once (cooperative launch). Block: 8 math warps, one epilogue warp,
// one loader thread. Every block owns some rows of every projection. Blocks exchange activations as tagged words
// (packet.cuh); there is no other synchronisation between them, and nothing is ever reset.
//
//   loader    weights and cached k, v, in the order of use, into the ring; never waits for an activation
//   math      await x; multiply chunks; partial rows to shared memory; after qkv attend, after the head draw
//   epilogue  sum partial rows; norm scale, residual, silu, noise; publish
#include <stdexcept>
#include <string>

#include "common/cuda_check.h"
#include "decode_step/attention.cuh"
#include "decode_step/epilogue.cuh"

namespace decode_step {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

__device__ __forceinline__ Work work_of_block(const Params& p, int i) {
    const int layer = i >> 2, op = i == 4 * p.num_layers ? static_cast<int>(kHead) : i & 3;
    const Rows rows = rows_of_block(p.linear[op], op, layer, blockIdx.x, gridDim.x);
    const bf16 *weights = p.lm_head, *norm = p.final_norm;
    if (op != kHead) {
        const LayerPointers& l = p.layers[layer];
        weights = op == kQkv ? l.qkv : op == kO ? l.o : op == kGateUp ? l.gate_up : l.down;
        norm = op == kQkv ? l.attn_norm : op == kGateUp ? l.mlp_norm : nullptr;
    }
    return {weights + static_cast<int64_t>(rows.begin) * p.linear[op].k, norm, rows.begin, rows.count};
}

template <int D>
__device__ __forceinline__ void load_context(const Params& p, const Step& step, int layer, RingLoader& ring) {
    constexpr int kRowBytes = D * 2, kTileBytes = kTileTokens * kRowBytes, kInSlot = kSlotBytes / (2 * kTileBytes);
    const AttentionWork work = attention_of_block(p, step.position, blockIdx.x);
    const int64_t first_block = static_cast<int64_t>(*p.slot) * p.blocks_per_slot;
#pragma unroll 1
    for (int first = work.tile_begin; first < work.tile_end; first += kInSlot) {
        // Bytes of the cached tokens of a tile; none where the new token is the first of its tile.
        const auto bytes_of = [&](int tile) {
            return tile < work.tile_end ? min(kTileTokens, step.position - tile * kTileTokens) * kRowBytes : 0;
        };
        ring.reserve(2 * (bytes_of(first) + (kInSlot == 2 ? bytes_of(first + 1) : 0)));
#pragma unroll
        for (int i = 0; i < kInSlot; ++i) {
            const int bytes = bytes_of(first + i);
            if (bytes == 0) continue;
            const int64_t source = layer * p.stride_cache_layer +
                                   ((first_block + first + i) * p.num_kv_heads + work.head) * (kTileTokens * D);
            ring.copy(ring.target() + 2 * i * kTileBytes, p.k_cache + source, bytes);
            ring.copy(ring.target() + (2 * i + 1) * kTileBytes, p.v_cache + source, bytes);
        }
        ring.next.advance(ring.ring);
    }
}

template <int D>
__device__ __forceinline__ void run_loader(const Params& p, const SharedState& shared, const Work* works,
                                           RingLoader ring) {
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
        // The ring's barriers order this after the previous step's layers on this block, and these fences carry what
        // the other blocks then appended to the cache over to the copy engine.
        __threadfence();
        asm volatile("fence.proxy.async.global;" ::: "memory");
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int op = i == 4 * p.num_layers ? static_cast<int>(kHead) : i & 3;
            if (op == kO) load_context<D>(p, step, i >> 2, ring);
            const char* source = reinterpret_cast<const char*>(works[i].weights);
            const int chunk_bytes = p.linear[op].chunk_bytes;
#pragma unroll 1
            for (int left = works[i].num_rows * p.linear[op].k * 2; left > 0; left -= chunk_bytes) {
                const int bytes = min(left, chunk_bytes);
                ring.reserve(bytes);
                ring.copy(ring.target(), source, bytes);
                ring.next.advance(ring.ring);
                source += chunk_bytes;
            }
        }
    }
}

__device__ __forceinline__ GemvInput input_of(const Params& p, const Work& work, int op, int layer, const Step& step,
                                              int token) {
    const uint32_t use = step.first_use + layer;
    const bool normed = !adds_residual(op);
    switch (op) {
        case kO:
            return {p.attn, use, nullptr, work.norm, normed};
        case kGateUp:
            return {p.x_mlp, use, nullptr, work.norm, normed};
        case kDown:
            return {p.act, use, nullptr, work.norm, normed};
        default:
            if (op == kQkv && layer == 0)
                return {nullptr, 0, p.embed + static_cast<int64_t>(token) * p.hidden_size, work.norm, normed};
            return {p.x_attn, use - 1, nullptr, work.norm, normed};
    }
}

template <int D>
__device__ __forceinline__ void run_math(const Params& p, const Work* works, RingReader ring, float* scratch, int warp,
                                         int lane, SharedState& shared) {
    uint32_t batch_count = 0;
    int token = static_cast<int>(*p.token_id);
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            if (op == kO) attention<D>(p, step, layer, warp, lane, ring, scratch, shared);
            const Linear& linear = p.linear[op];
            const int rows = works[i].num_rows;
            if (rows == 0) continue;
            const GemvInput in = input_of(p, works[i], op, layer, step, token);
            switch (linear.units) {
#define GEMV(U)                                                                                  \
    case U:                                                                                      \
        gemv<U>(linear, op, in, rows, p.exchange_chunks, warp, lane, ring, batch_count, shared); \
        break;
                GEMV(1) GEMV(2) GEMV(3) GEMV(4) GEMV(7)  // kUnitChoices
#undef GEMV
            }
        }
        if (!p.draws) continue;
        uint32_t round = *static_cast<const volatile uint32_t*>(&shared.rounds_done);
        token = draw_token(p, works[4 * p.num_layers], round, *reinterpret_cast<HeadRows*>(scratch), index & 1, warp,
                           lane, shared);
        common::named_sync(1, kMathThreads);  // all have read rounds_done
        if (warp == 0 && lane == 0) {
            shared.token = token;
            shared.rounds_done = round;
            common::mbarrier_arrive(common::shared_address(&shared.token_drawn));
        }
    }
}

#endif

// Of attention, and of the head's logits, plain and perturbed.
__host__ __device__ constexpr int scratch_bytes_of(int head_dim, int group) {
    const int attention = attention_scratch_bytes(head_dim, group), head = sizeof(HeadRows);
    return attention > head ? attention : head;
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1) decode_step_kernel(const __grid_constant__ Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char memory[];
    SharedState& shared = *reinterpret_cast<SharedState*>(memory);
    Work* const works = reinterpret_cast<Work*>(memory + align_up(sizeof(SharedState)));

    const int position = *p.position;
    if (position < 0 || position + p.num_steps > p.max_positions) return;  // the same on every block

    if (threadIdx.x == 0) {
        shared.position = position;
        shared.steps_done = p.steps_done[0];
        shared.rounds_done = p.steps_done[1];
        common::mbarrier_init(common::shared_address(&shared.head_done), 1);
        common::mbarrier_init(common::shared_address(&shared.token_drawn), 1);
        shared.ring.exchanging = 0;
#pragma unroll 1
        for (int i = 0; i < kMaxSlots; ++i) {
            common::mbarrier_init(common::shared_address(&shared.ring.full[i]), 1);
            common::mbarrier_init(common::shared_address(&shared.ring.empty[i]), kMathWarps);
        }
#pragma unroll 1
        for (int i = 0; i < kBatchBuffers; ++i) {
            common::mbarrier_init(common::shared_address(&shared.batch_full[i]), kMathWarps);
            common::mbarrier_init(common::shared_address(&shared.batch_empty[i]), 1);
        }
        common::fence_barrier_init();
    }
    if (threadIdx.x < 32) shared.profile[threadIdx.x] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_works(p.num_layers); i += kThreads) works[i] = work_of_block(p, i);
    __syncthreads();

    const int warp = threadIdx.x / 32;
    // Worked out in each role: what is worked out before them would be kept in the registers that all roles have.
    const auto after_works = [&] {
        return memory + align_up(sizeof(SharedState)) + align_up(num_works(pinned(p.num_layers)) * sizeof(Work));
    };
    const auto ring = [&] {
        const uint32_t barriers = pinned(common::shared_address(&shared.ring));
        const int scratch_bytes = scratch_bytes_of(D, p.group);
        return Ring{common::shared_address(after_works() + scratch_bytes), barriers, barriers + kMaxSlots * 8,
                    static_cast<uint32_t>(p.num_slots)};
    };
    PROFILE_BEGIN(kernel_began);
    // Registers move from the helpers' warp group to the math warps' two: 128 * 88 + 256 * 208 = 384 * 168.
    if (warp < kMathWarps) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        run_math<D>(p, works, RingReader{ring()}, reinterpret_cast<float*>(after_works()), warp,
                    pinned(threadIdx.x % 32), shared);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == kEpilogueWarp) {
            run_epilogue(p, works, *reinterpret_cast<HeadRows*>(after_works()), pinned(threadIdx.x % 32), shared);
        } else if (threadIdx.x == kLoaderWarp * 32) {
            run_loader<D>(
                p, shared, works,
                RingLoader{ring(), uint32_t(p.max_streaming), uint32_t(p.max_exchanging), &shared.ring.exchanging});
        }
    }
#ifdef DECODE_STEP_PROFILE
    if (warp == 0) PROFILE_END(shared, 21, kernel_began);
    __syncthreads();
    if (threadIdx.x < 32) p.profile[blockIdx.x * 32 + threadIdx.x] = shared.profile[threadIdx.x];
#endif
#endif
}

int fixed_smem_bytes(int num_layers, int head_dim, int group) {
    return align_up(sizeof(SharedState)) + scratch_bytes_of(head_dim, group) +
           align_up(num_works(num_layers) * sizeof(Work));
}

static const void* kernel_for(int head_dim) {
    if (head_dim == 64) return reinterpret_cast<const void*>(decode_step_kernel<64>);
    if (head_dim == 128) return reinterpret_cast<const void*>(decode_step_kernel<128>);
    throw std::runtime_error("decode_step: no kernel for head_dim " + std::to_string(head_dim));
}

void launch(Params params, int head_dim, int grid, int max_smem_bytes, void* stream) {
    params.group = params.num_heads / params.num_kv_heads;
    const int fixed = fixed_smem_bytes(params.num_layers, head_dim, params.group);
    params.num_slots = min((max_smem_bytes - fixed) / kSlotBytes, kMaxSlots);
    params.max_streaming = min(params.max_streaming, params.num_slots - 1);
    params.max_exchanging = min(params.max_exchanging, params.num_slots - 1);
    const int smem_bytes = fixed + params.num_slots * kSlotBytes;
    const void* kernel = kernel_for(head_dim);
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
    void* arguments[] = {&params};
    CHECK_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(grid), dim3(kThreads), arguments, smem_bytes,
                                           static_cast<cudaStream_t>(stream)));
}

}  // namespace decode_step
