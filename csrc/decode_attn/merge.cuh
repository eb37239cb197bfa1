// From the warps' states to the output: first over the warps of the block in shared memory, then, where a unit was cut,
// over the blocks through global memory.
//
// Between blocks every 32-bit word of a partial is its own flag. At rest a word is kEmptyWord, a NaN that no arithmetic
// produces; a block publishes by plain relaxed stores, the block that finishes the unit reads a word until it is no
// longer empty, and puts kEmptyWord back. No fence, no counter, one trip through L2, and the workspace is clean for the
// next launch. The reader waits only for blocks of lower blockIdx (see kernel.cuh), which the hardware started before
// it and which themselves wait for nobody, so the wait ends. Partials are added in the order of their ranges: a repeat
// is bitwise equal.
#pragma once
#include "decode_attn/schedule.cuh"
#include "decode_attn/tile_math.cuh"

namespace decode_attn {

constexpr int kMergeBarrier = 1;

__device__ __forceinline__ float4 load_relaxed(const float* address) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_relaxed(float* address, float4 x) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}

__device__ __forceinline__ void store_relaxed(float* address, float2 x) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ bool is_empty(float x) {
    return __float_as_uint(x) == kEmptyWord;
}
__device__ __forceinline__ bool is_empty(float4 x) {
    return is_empty(x.x) || is_empty(x.y) || is_empty(x.z) || is_empty(x.w);
}

// Two neighbouring columns of one head: what a thread merges at a time.
struct ColumnPair {
    SoftmaxState state = SoftmaxState::empty();
    float2 o = {0.0f, 0.0f};
};

// Writes this warp's state to `target` (see state_stride) in shared memory.
template <int kHeadDim>
__device__ void stage_warp_state(WarpState<kHeadDim>& state, float* target, int group, int lane) {
    state.reduce();
    const int r = lane / 4, c = 2 * (lane & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (c + h >= group) break;
        float* row = target + (c + h) * state_stride(kHeadDim);
        if (r == 0) *reinterpret_cast<float4*>(row + kHeadDim) = {state.head[h].max, state.head[h].sum, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
            row[16 * i + r] = state.o[i][h];
            row[16 * i + 8 + r] = state.o[i][h + 2];
        }
    }
}

// Adds `count` states in shared memory, in order. `first` points at the head's row of the first, `distance` floats
// apart.
template <int kHeadDim>
__device__ __forceinline__ void add_states(ColumnPair& total, const float* first, int count, int distance, int column) {
    float top = total.state.max;
#pragma unroll 4
    for (int i = 0; i < count; ++i) top = fmaxf(top, first[i * distance + kHeadDim]);
    const float own = total.state.factor(top);
    total = {{top, total.state.sum * own}, {total.o.x * own, total.o.y * own}};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        const float* row = first + i * distance;
        const float2 part = *reinterpret_cast<const float2*>(row + kHeadDim),
                     o = *reinterpret_cast<const float2*>(row + column);
        const float factor = SoftmaxState{part.x, part.y}.factor(top);
        total.state.sum += factor * part.y;
        total.o.x += factor * o.x;
        total.o.y += factor * o.y;
    }
}

// A merged state, pair by pair, to shared memory, or to global memory for another block.
template <int kHeadDim>
__device__ __forceinline__ void keep(const ColumnPair& part, float* row, int column) {
    *reinterpret_cast<float2*>(row + column) = part.o;
    if (column == 0) *reinterpret_cast<float4*>(row + kHeadDim) = {part.state.max, part.state.sum, 0.0f, 0.0f};
}

template <int kHeadDim>
__device__ __forceinline__ void publish(const ColumnPair& part, float* row, int column) {
    store_relaxed(row + column, part.o);
    if (column == 0) store_relaxed(row + kHeadDim, float4{part.state.max, part.state.sum, 0.0f, 0.0f});
}

// Copies `words` published floats (a multiple of 4) to shared memory and empties them. A word that has not come yet is
// asked for again, so the wait costs one trip through L2 after the last arrival. All kConsumerThreads threads take
// part.
__device__ __forceinline__ void take_published(float* target, float* source, int words) {
    constexpr int kInFlight = 8, kStep = 4 * kConsumerThreads;
    const float empty = __uint_as_float(kEmptyWord);
#pragma unroll 1
    for (int start = 4 * threadIdx.x; start < words; start += kInFlight * kStep) {
        float4 x[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x[i] = {start + i * kStep < words ? empty : 0.0f, 0.0f, 0.0f, 0.0f};
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (is_empty(x[i])) x[i] = load_relaxed(source + start + i * kStep);
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) missing |= is_empty(x[i]);
        } while (missing);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (start + i * kStep >= words) break;
            *reinterpret_cast<float4*>(target + start + i * kStep) = x[i];
            store_relaxed(source + start + i * kStep, float4{empty, empty, empty, empty});
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
#pragma unroll 1
    for (int pair = threadIdx.x; pair < p.num_kv_heads * p.group * (kHeadDim / 2); pair += kConsumerThreads) {
        write_output<T>(ColumnPair{}, p, row, pair / (kHeadDim / 2), pair % (kHeadDim / 2) * 2);
    }
}

}  // namespace decode_attn
