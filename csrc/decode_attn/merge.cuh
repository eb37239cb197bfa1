// Units that were cut are merged over the blocks through global memory; then the output.
//
// Between blocks every 16 bytes are their own flag. At rest the first word is kEmptyWord, a NaN that no arithmetic
// produces. A block publishes by plain relaxed 128-bit stores, the block that finishes the unit reads until a place is
// no longer empty, and empties it again. No fence, no counter, one trip through L2, and the workspace is clean for the
// next launch. The reader waits only for blocks of lower blockIdx (see kernel.cuh), which the hardware started before
// it and which themselves wait for nobody, so the wait ends. Partials are added in a fixed order: a repeat is bitwise
// equal.
#pragma once
#include "decode_attn/tile_math.cuh"

namespace decode_attn {

// 128-bit accesses: all four floats arrive together.
__device__ __forceinline__ float4 load_relaxed(const float4* address) {
    uint64_t low, high;
    asm volatile("{.reg .b128 x; ld.relaxed.gpu.global.b128 x, [%2]; mov.b128 {%0, %1}, x;}"
                 : "=l"(low), "=l"(high)
                 : "l"(address)
                 : "memory");
    return {__uint_as_float(static_cast<uint32_t>(low)), __uint_as_float(static_cast<uint32_t>(low >> 32)),
            __uint_as_float(static_cast<uint32_t>(high)), __uint_as_float(static_cast<uint32_t>(high >> 32))};
}

__device__ __forceinline__ void store_relaxed(float4* address, float4 x) {
    const uint64_t low = __float_as_uint(x.x) | static_cast<uint64_t>(__float_as_uint(x.y)) << 32,
                   high = __float_as_uint(x.z) | static_cast<uint64_t>(__float_as_uint(x.w)) << 32;
    asm volatile("{.reg .b128 x; mov.b128 x, {%1, %2}; st.relaxed.gpu.global.b128 [%0], x;}" ::"l"(address), "l"(low),
                 "l"(high)
                 : "memory");
}

__device__ __forceinline__ float4 empty_quad() {
    const float empty = __uint_as_float(kEmptyWord);
    return {empty, empty, empty, empty};
}
__device__ __forceinline__ bool is_empty(float4 x) {
    return __float_as_uint(x.x) == kEmptyWord;
}

// Which part a lane has in passing on what a warp holds. Two heads make a pair; of the four lanes of a row the first
// ones hold one pair each. Groups of few heads leave lanes idle: those share the collecting.
struct Lane {
    int pairs;    // in the group
    int sharing;  // 2^sharing lanes collect for a pair
    int pair;     // this lane's; it has no part if that is not among `pairs`
    int share;    // of the work for its pair; 0: it holds the results

    __device__ Lane(int group, int lane) {
        pairs = (group + 1) / 2;
        sharing = pairs == 1 ? 2 : pairs == 2 ? 1 : 0;
        share = (lane & 3) >> (2 - sharing);
        pair = (lane & 3) & ((4 >> sharing) - 1);
    }
};

// Where a range's partial of 16 columns lies.
struct Partial {
    float4 *o, *state;
    static constexpr int kDistance = kPartialFloats / 4;  // between ranges
    __device__ Partial(float* partials, int range, int column, const Lane& my, int lane) {
        float4* base = reinterpret_cast<float4*>(partials) + int64_t(range) * kDistance +
                       column / 16 * (kColumnsPartialFloats / 4);
        o = base + lane / 4 * my.pairs + my.pair;
        state = base + 8 * my.pairs + my.pair;
    }
};

__device__ __forceinline__ void publish(const Result& part, const Params& p, int range, int column, int lane) {
    const Lane my(p.group, lane);
    if (my.share > 0 || my.pair >= my.pairs) return;
    const Partial place(p.partials, range, column, my, lane);
    store_relaxed(place.o, {part.o[0], part.o[1], part.o[2], part.o[3]});
    if (lane < 4) store_relaxed(place.state, {part.max[0], part.sum[0], part.max[1], part.sum[1]});
}

// Adds the partials of the `count` ranges from `first` on. A place that is still empty is asked for again, alone, so
// the wait costs one trip through L2 after the last arrival. Eight partials a lane are on their way at a time; of their
// states each row of lanes looks after one.
__device__ __forceinline__ void collect(Result& total, const Params& p, int first, int count, int column, int lane) {
    constexpr int kBatch = 8;
    const Lane my(p.group, lane);
    const int turn = lane / 4;
    if (my.share > 0) total = {{-INFINITY, -INFINITY}, {}, {}};
#pragma unroll 1
    for (; count > 0; first += kBatch << my.sharing, count -= kBatch << my.sharing) {
        const Partial place(p.partials, first + my.share, column, my, lane);
        const int step = Partial::kDistance << my.sharing;
        const int mine = my.pair < my.pairs ? (count - my.share + (1 << my.sharing) - 1) >> my.sharing : 0;
        float4 o[kBatch], state = turn < mine ? empty_quad() : float4{-INFINITY, 0.0f, -INFINITY, 0.0f};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) o[i] = i < mine ? empty_quad() : float4{0.0f, 0.0f, 0.0f, 0.0f};
        bool missing;
        do {  // the first round asks for everything, the last one finds nothing missing
            missing = is_empty(state);
            if (missing) state = load_relaxed(place.state + turn * step);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (is_empty(o[i])) {
                    o[i] = load_relaxed(place.o + i * step);
                    missing = true;
                }
            }
        } while (__any_sync(~0u, missing));
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (i < mine) store_relaxed(place.o + i * step, empty_quad());
        }
        if (turn < mine) store_relaxed(place.state + turn * step, empty_quad());

        float top[2] = {state.x, state.z};
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], distance));
            top[1] = fmaxf(top[1], __shfl_xor_sync(~0u, top[1], distance));
        }
        const bool any = mine > 0;
        float factor[2], sum[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            top[h] = any ? fmaxf(top[h], total.max[h]) : 0.0f;
            factor[h] = exp2_fast((h ? state.z : state.x) - top[h]);
            sum[h] = factor[h] * (h ? state.w : state.y);
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], distance);
            const float own = any ? exp2_fast(total.max[h] - top[h]) : 1.0f;
            total.max[h] = any ? top[h] : total.max[h];
            total.sum[h] = total.sum[h] * own + sum[h];
            total.o[h] *= own;
            total.o[h + 2] *= own;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float low = __shfl_sync(~0u, factor[0], 4 * i + (lane & 3)),
                        high = __shfl_sync(~0u, factor[1], 4 * i + (lane & 3));
            total.o[0] += low * o[i].x;
            total.o[1] += high * o[i].y;
            total.o[2] += low * o[i].z;
            total.o[3] += high * o[i].w;
        }
    }
    const auto add_from = [&](int distance) {
        const auto from = [&](float x) { return __shfl_down_sync(~0u, x, distance); };
        const float4 state = {from(total.max[0]), from(total.sum[0]), from(total.max[1]), from(total.sum[1])};
        const float4 o = {from(total.o[0]), from(total.o[1]), from(total.o[2]), from(total.o[3])};
        if ((lane & 3) < distance && state.x != -INFINITY) total.add(state, o);
    };
    if (my.sharing >= 1) add_from(2);
    if (my.sharing == 2) add_from(1);
}

// 16 columns, the first of them `column`, of all heads of the group.
template <typename T>
__device__ __forceinline__ void write_output(const Result& total, const Params& p, int row, int kv_head, int column,
                                             int lane) {
    const float scale[2] = {__fdividef(1.0f, total.sum[0]), __fdividef(1.0f, total.sum[1])};
    const uint32_t low = common::transpose_8x8(
                       common::Pack<T>::from_floats(total.o[0] * scale[0], total.o[1] * scale[1])),
                   high = common::transpose_8x8(
                       common::Pack<T>::from_floats(total.o[2] * scale[0], total.o[3] * scale[1]));
    const int head = lane / 4;  // two neighbouring columns of one head
    if (head < p.group) {
        T* out = static_cast<T*>(p.out) + row * p.stride_out_row + (kv_head * p.group + head) * p.stride_out_head +
                 column + 2 * (lane & 3);
        *reinterpret_cast<uint32_t*>(out) = low;
        *reinterpret_cast<uint32_t*>(out + 8) = high;
    }
    if (p.lse && column == 0 && lane < 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (2 * lane + h < p.group) {
                p.lse[(row * p.num_kv_heads + kv_head) * p.group + 2 * lane + h] =
                    SoftmaxState{total.max[h], total.sum[h]}.log_sum_exp();
            }
        }
    }
}

// The output of a row that attends to nothing, by one warp.
template <typename T, int kHeadDim>
__device__ void write_zeros(const Params& p, int row, int lane) {
    for (int head = 0; head < p.num_kv_heads * p.group; ++head) {
        T* out = static_cast<T*>(p.out) + row * p.stride_out_row + head * p.stride_out_head;
        for (int pair = lane; pair < kHeadDim / 2; pair += 32) reinterpret_cast<uint32_t*>(out)[pair] = 0u;
        if (p.lse && lane == 0) p.lse[row * p.num_kv_heads * p.group + head] = -INFINITY;
    }
}

}  // namespace decode_attn
