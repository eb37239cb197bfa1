// From the warps' states to the output: first over the warps of the block in shared memory, then, where a unit was cut, over
// the blocks through global memory.
//
// Between blocks every 32-bit word of a partial is its own flag. At rest a word is kEmptyWord, a NaN that no arithmetic
// produces; a block publishes by plain relaxed stores, the block that finishes the unit reads a word until it is no longer
// empty, and puts kEmptyWord back. No fence, no counter, one trip through L2, and the workspace is clean for the next launch.
// The reader waits only for blocks of lower blockIdx (see kernel.cuh), which the hardware started before it and which
// themselves wait for nobody, so the wait ends. Partials are added in the order of their ranges: a repeat is bitwise equal.
#pragma once
#include "decode_attn/schedule.cuh"
#include "decode_attn/tile_math.cuh"

namespace decode_attn {

constexpr int kMergeBarrier = 1;

__device__ __forceinline__ float2 load_relaxed(const float* address) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_relaxed(float* address, float2 x) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ bool is_empty(float2 x) {
    return __float_as_uint(x.x) == kEmptyWord || __float_as_uint(x.y) == kEmptyWord;
}

__device__ __forceinline__ void clear(float* address) {
    store_relaxed(address, {__uint_as_float(kEmptyWord), __uint_as_float(kEmptyWord)});
}

// Two neighbouring columns of one head: the unit in which threads merge. 32 threads of a warp share the head.
struct ColumnPair {
    SoftmaxState state;
    float2 o;
};

// Places the state of every warp in shared memory. Layout: O [warp][head][head_dim + 4], (max, sum) [warp][head].
template <int kHeadDim>
__device__ void stage_warp_state(WarpState<kHeadDim>& state, float* merge, SoftmaxState* stats, int group, int warp, int lane) {
    state.reduce();
    const int r = lane / 4, c = 2 * (lane & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (c + h >= group) break;
        if (r == 0) stats[warp * kMaxGroup + c + h] = state.head[h];
        float* o = merge + (warp * group + c + h) * (kHeadDim + 4) + r;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
            o[16 * i] = state.o[i][h];
            o[16 * i + 8] = state.o[i][h + 2];
        }
    }
}

template <int kHeadDim>
__device__ ColumnPair merge_warps(const float* merge, const SoftmaxState* stats, int group, int head, int column) {
    ColumnPair total{SoftmaxState::empty(), {0.0f, 0.0f}};
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) total.state.max = fmaxf(total.state.max, stats[warp * kMaxGroup + head].max);
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
        const SoftmaxState part = stats[warp * kMaxGroup + head];
        const float factor = part.factor(total.state.max);
        const float2 o = *reinterpret_cast<const float2*>(merge + (warp * group + head) * (kHeadDim + 4) + column);
        total.state.sum += factor * part.sum;
        total.o.x += factor * o.x;
        total.o.y += factor * o.y;
    }
    return total;
}

// A block's partial in global memory: O [group][head_dim], then (max, sum) once for every warp that reads it.
template <int kHeadDim>
struct Partial {
    float *o, *stats;
    __device__ Partial(float* partials, int range, int group, int head, int column) {
        float* base = partials + int64_t(range) * kPartialFloats;
        o = base + head * kHeadDim + column;
        stats = base + group * kHeadDim + 2 * (head * (kHeadDim / 64) + column / 64);
    }
};

template <int kHeadDim>
__device__ void publish(const ColumnPair& part, float* partials, int range, int group, int head, int column, int lane) {
    const Partial<kHeadDim> slot(partials, range, group, head, column);
    store_relaxed(slot.o, part.o);
    if (lane == 0) store_relaxed(slot.stats, {part.state.max, part.state.sum});
}

// Adds the partials of ranges [first, last] to `total`. All 32 lanes of the warp hold one head; each lane reads the
// (max, sum) of one range, and its own columns of every range.
template <int kHeadDim>
__device__ void collect(ColumnPair& total, float* partials, int first, int last, int group, int head, int column, int lane) {
    constexpr int kBatch = 16;  // loads in flight
    for (; first <= last; first += kBatch) {
        const int count = min(kBatch, last - first + 1);
        float2 o[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (i < count) o[i] = load_relaxed(Partial<kHeadDim>(partials, first + i, group, head, column).o);
        }
        SoftmaxState mine = SoftmaxState::empty();
        if (lane < count) {
            float* stats = Partial<kHeadDim>(partials, first + lane, group, head, column).stats;
            float2 x = load_relaxed(stats);
            while (is_empty(x)) x = load_relaxed(stats);
            clear(stats);
            mine = {x.x, x.y};
        }
        float top = fmaxf(mine.max, total.state.max);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
        const float own = total.state.rescale(top), factor = mine.factor(top);
        float sum = factor * mine.sum;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        total.state.sum += sum;
        total.o.x *= own;
        total.o.y *= own;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float weight = __shfl_sync(~0u, factor, i);
            if (i < count) {
                float* address = Partial<kHeadDim>(partials, first + i, group, head, column).o;
                while (is_empty(o[i])) o[i] = load_relaxed(address);
                clear(address);
                total.o.x += weight * o[i].x;
                total.o.y += weight * o[i].y;
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void write_output(const ColumnPair& total, const Params& p, int row, int head, int column) {
    const float scale = total.state.normalizer();
    T* out = static_cast<T*>(p.out) + row * p.stride_out_row + head * p.stride_out_head + column;
    *reinterpret_cast<uint32_t*>(out) = common::Pack<T>::from_floats(total.o.x * scale, total.o.y * scale);
    if (p.lse && column == 0) p.lse[row * (p.num_kv_heads * p.group) + head] = total.state.log_sum_exp();
}

// The output of a row that attends to nothing.
template <typename T, int kHeadDim>
__device__ void write_zeros(const Params& p, int row) {
    for (int pair = threadIdx.x; pair < p.num_kv_heads * p.group * (kHeadDim / 2); pair += kConsumerThreads) {
        write_output<T>({SoftmaxState::empty(), {0.0f, 0.0f}}, p, row, pair / (kHeadDim / 2), pair % (kHeadDim / 2) * 2);
    }
}

}  // namespace decode_attn
