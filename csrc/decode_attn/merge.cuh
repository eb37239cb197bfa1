// From the warps' states to the output: first over the warps of the block in shared memory, then, where a unit was cut,
// over the blocks through global memory.
//
// Between blocks every pair of floats is its own flag. At rest its first word is kEmptyWord, a NaN that no arithmetic
// produces. A block publishes by plain relaxed 64-bit stores, the block that finishes the unit reads a pair until it is
// no longer empty, and empties it again. No fence, no counter, one trip through L2, and the workspace is clean for the
// next launch. The reader waits only for blocks of lower blockIdx (see kernel.cuh), which the hardware started before
// it and which themselves wait for nobody, so the wait ends. Partials are added in the order of their ranges: a repeat
// is bitwise equal.
#pragma once
#include "decode_attn/schedule.cuh"
#include "decode_attn/tile_math.cuh"

namespace decode_attn {

constexpr int kMergeBarrier = 1;

// Scalar 64-bit accesses: both floats of a pair arrive together.
__device__ __forceinline__ float2 load_relaxed(const float* address) {
    uint64_t x;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(x) : "l"(address) : "memory");
    return {__uint_as_float(static_cast<uint32_t>(x)), __uint_as_float(static_cast<uint32_t>(x >> 32))};
}

__device__ __forceinline__ void store_relaxed(float* address, float2 x) {
    const uint64_t bits = __float_as_uint(x.x) | static_cast<uint64_t>(__float_as_uint(x.y)) << 32;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
}

__device__ __forceinline__ float2 empty_pair() {
    return {__uint_as_float(kEmptyWord), __uint_as_float(kEmptyWord)};
}
__device__ __forceinline__ bool is_empty(float2 x) {
    return __float_as_uint(x.x) == kEmptyWord;
}

// Two neighbouring columns of one head: what a thread merges at a time. The 32 threads of a warp hold one head.
struct ColumnPair {
    SoftmaxState state = SoftmaxState::empty();
    float2 o = {0.0f, 0.0f};
};

// Places this warp's state in shared memory: O [warp][head][state_stride] and (max, sum) [warp][head].
template <int kHeadDim>
__device__ void stage_warp_state(WarpState<kHeadDim>& state, float* states, SoftmaxState* stats, int group, int warp,
                                 int lane) {
    state.reduce();
    const int r = lane / 4, c = 2 * (lane & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (c + h >= group) break;
        if (r == 0) stats[warp * kMaxGroup + c + h] = state.head[h];
        float* o = states + (warp * group + c + h) * state_stride(kHeadDim) + r;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
            o[16 * i] = state.o[i][h];
            o[16 * i + 8] = state.o[i][h + 2];
        }
    }
}

template <int kHeadDim>
__device__ __forceinline__ ColumnPair merge_warps(const float* states, const SoftmaxState* stats, int group, int head,
                                                  int column) {
    ColumnPair total;
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
        total.state.max = fmaxf(total.state.max, stats[warp * kMaxGroup + head].max);
    }
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
        const SoftmaxState part = stats[warp * kMaxGroup + head];
        const float factor = part.factor(total.state.max);
        const float* o = states + (warp * group + head) * state_stride(kHeadDim) + column;
        total.state.sum += factor * part.sum;
        total.o.x += factor * o[0];
        total.o.y += factor * o[1];
    }
    return total;
}

// A block's partial in global memory, as the threads of one column pair and head see it.
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

// Adds the partials of ranges [first, last] to `total`, which is not empty. A pair that has not come yet is asked for
// again, alone, so the wait costs one trip through L2 after the last arrival. Runs once a block, from a cold
// instruction cache: what counts is few instructions.
template <int kHeadDim>
__device__ void collect(ColumnPair& total, float* partials, int first, int last, int group, int head, int column,
                        int lane) {
    constexpr int kBatch = 8;  // partials in flight
#pragma unroll 1
    for (; first <= last; first += kBatch) {
        const Partial<kHeadDim> slot(partials, first, group, head, column);
        const int count = min(kBatch, last - first + 1);
        float2 o[kBatch], stats[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            o[i] = i < count ? empty_pair() : float2{0.0f, 0.0f};
            stats[i] = i < count ? empty_pair() : float2{-INFINITY, 0.0f};
        }
        bool missing;
        do {  // the first round asks for everything, the last one finds nothing missing
            missing = false;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (is_empty(o[i]) || is_empty(stats[i])) {
                    stats[i] = load_relaxed(slot.stats + i * kPartialFloats);
                    o[i] = load_relaxed(slot.o + i * kPartialFloats);
                    missing = true;
                }
            }
        } while (__any_sync(~0u, missing));

        float top = total.state.max;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) top = fmaxf(top, stats[i].x);
        const float own = total.state.rescale(top);
        total.o.x *= own;
        total.o.y *= own;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float factor = exp2_fast(stats[i].x - top);
            total.state.sum += factor * stats[i].y;
            total.o.x += factor * o[i].x;
            total.o.y += factor * o[i].y;
        }
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            store_relaxed(slot.o + i * kPartialFloats, empty_pair());
            if (lane == 0) store_relaxed(slot.stats + i * kPartialFloats, empty_pair());
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
