// Units that were cut are merged over the blocks through global memory; then the output.
//
// Between blocks every 16 bytes are their own flag: a place is empty if its first word is kEmptyWord, a NaN that no
// arithmetic produces. A block publishes by plain relaxed 128-bit stores, the block that finishes the unit reads until
// a place is no longer empty. No fence, no flag beside the data, one trip through L2. There are two buffers: the one
// that this launch does not use is emptied for the next one by the query warp, once it has nothing else to do. The
// reader waits only for blocks of lower blockIdx (see kernel.cuh), which the hardware started before it and which
// themselves wait for nobody, so the wait ends. Partials are added in a fixed order: a repeat is bitwise equal.
#pragma once
#include "decode_attn/split.h"
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

// 16 bytes that hold 16 columns of a pair's partial: one for each of the eight lanes that share it, and one of the
// state.
constexpr int kQuadsOfPair = 8 + 1;
static_assert(kColumnsPartialFloats == kMaxGroup / 2 * kQuadsOfPair * 4);

// What a range remembers from launch to launch, behind its two buffers. The launches use these in turn: what the last
// one has published is out of the way while this one publishes, and is emptied for the next.
struct alignas(16) RangeState {
    uint32_t launches;  // that the range has seen, whether they had work for it or not
    int filled;         // by the last one: 16-column groups * 16 + pairs of heads; 0: nothing
    int padding[2];

    __device__ static RangeState* of(const Params& p, int range) {
        return reinterpret_cast<RangeState*>(p.partials + int64_t(range) * kRangeFloats + 2 * kPartialFloats);
    }
    __device__ int buffer() const { return launches & 1; }
};
static_assert(sizeof(RangeState) == 4 * (kRangeFloats - 2 * kPartialFloats));

// Prepares a range, whose state was `state`, for the next launch; `filled`: by this one. One warp.
__device__ __forceinline__ void prepare_next(const Params& p, int range, RangeState state, int filled, int lane) {
    const int quads = kQuadsOfPair * (state.filled % 16);
    auto* at =
        reinterpret_cast<float4*>(p.partials + int64_t(range) * kRangeFloats + (1 - state.buffer()) * kPartialFloats);
#pragma unroll 1
    for (int columns = state.filled / 16; columns > 0; --columns, at += kColumnsPartialFloats / 4)
#pragma unroll 1
        for (int quad = lane; quad < quads; quad += 32) at[quad] = empty_quad();
    if (lane == 0) *RangeState::of(p, range) = {state.launches + 1, filled, {}};
}

// Where a range's partial of 16 columns lies in one of the buffers.
struct Partial {
    float4 *o, *state;
    static constexpr int kDistance = kRangeFloats / 4;  // between ranges
    __device__ Partial(float* partials, int range, int buffer, int column, const Lane& my, int lane) {
        float4* base = reinterpret_cast<float4*>(partials) + int64_t(range) * kDistance +
                       buffer * (kPartialFloats / 4) + column / 16 * (kColumnsPartialFloats / 4);
        o = base + lane / 4 * my.pairs + my.pair;
        state = base + 8 * my.pairs + my.pair;
    }
};

__device__ __forceinline__ void publish(const Result& part, const Params& p, int range, int buffer, int column,
                                        int lane) {
    const Lane my(p.group, lane);
    if (my.share > 0 || my.pair >= my.pairs) return;
    const Partial place(p.partials, range, buffer, column, my, lane);
    store_relaxed(place.o, {part.o[0], part.o[1], part.o[2], part.o[3]});
    if (lane < 4) store_relaxed(place.state, {part.max[0], part.sum[0], part.max[1], part.sum[1]});
}

// Adds the partials of the `count` ranges from `first` on. A place that is still empty is asked for again, alone, so
// the wait costs one trip through L2 after the last arrival. Eight partials a lane are on their way at a time; of their
// states each row of lanes looks after one. What follows the last arrival is on the way to the kernel's end, and short.
__device__ __forceinline__ void collect(Result& total, const Params& p, int first, int count, int buffer, int column,
                                        int lane) {
    constexpr int kBatch = 8;
    const Lane my(p.group, lane);
    const int turn = lane / 4;
    if (my.share > 0) total = {{-INFINITY, -INFINITY}, {}, {}};
    // Over the lanes that hold the same pair of heads: those that share, and rows of lanes up to `furthest` away.
    const int nearest = 4 >> my.sharing;
    const auto over_lanes = [&](auto& x, int furthest, auto combine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            if (distance > furthest || distance < nearest) continue;
#pragma unroll
            for (float& y : x) y = combine(y, __shfl_xor_sync(~0u, y, distance));
        }
    };
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    const auto plus = [](float a, float b) { return a + b; };
#pragma unroll 1
    for (; count > 0; first += kBatch << my.sharing, count -= kBatch << my.sharing) {
        const Partial place(p.partials, first + my.share, buffer, column, my, lane);
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
        const float max[2] = {state.x, state.z};
        float top[2] = {fmaxf(max[0], total.max[0]), fmaxf(max[1], total.max[1])};
        over_lanes(top, 16, larger);
        const float factor[2] = {exp2_fast(max[0] - top[0]), exp2_fast(max[1] - top[1])};
        float sum[2] = {factor[0] * state.y, factor[1] * state.w};
        over_lanes(sum, 16, plus);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float own = exp2_fast(total.max[h] - top[h]);
            total.max[h] = top[h];
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
    over_lanes(total.o, 2, plus);
}

// Where a lane writes of a unit's output: two neighbouring columns of one head. The first of the 16 columns is
// `column`.
template <typename T>
__device__ __forceinline__ T* output_of(const Params& p, int row, int kv_head, int column, int lane) {
    const int head = min(lane / 4, p.group - 1);
    return static_cast<T*>(p.out) + row * p.stride_out_row + (kv_head * p.group + head) * p.stride_out_head + column +
           2 * (lane & 3);
}

// 16 columns of all heads of the group, to `out` = output_of(...).
template <typename T>
__device__ __forceinline__ void write_output(const Result& total, const Params& p, T* out, int row, int kv_head,
                                             int column, int lane) {
    const float scale[2] = {inverse(total.sum[0]), inverse(total.sum[1])};
    const uint32_t low = common::transpose_8x8(
                       common::Pack<T>::from_floats(total.o[0] * scale[0], total.o[1] * scale[1])),
                   high = common::transpose_8x8(
                       common::Pack<T>::from_floats(total.o[2] * scale[0], total.o[3] * scale[1]));
    if (lane / 4 < p.group) {
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
