// The mathematics on one tile of 64 tokens, all query heads of the group at once, by four warps together.
//
//   scores   S^T [16 tokens x 8 heads] = K Q^T: each warp its slice of 16 tokens
//            -- the warps exchange the slices' maxima --
//   weights  P = 2^(S - max), with one maximum for the tile
//            -- the warps exchange the weights --
//   values   O^T [16 columns x 8 heads] += V^T P^T: each warp a quarter of the columns, over all tokens
//
// So four warps have one softmax state, and O lies in their registers, each column once: at the end of a piece only the
// two tile groups are merged.
//
// Tokens and columns fill the 16-wide side of the tensor-core tile, heads its 8-wide side, so a group of 8 wastes
// nothing. A thread holds the heads 2 * (lane % 4) and the next one, in S^T and in O^T alike, so the softmax factors
// never move between threads.
#pragma once
#include "common/async.cuh"
#include "common/mma.cuh"
#include "decode_attn/params.h"
#include "decode_attn/softmax.cuh"

namespace decode_attn {

template <int kHeadDim>
struct QueryFragments {
    uint32_t b[kHeadDim / 16][2];  // Q^T, 16 columns each
};

// What a tile group has gathered for a unit, as one thread holds it.
template <int kHeadDim>
struct GroupState {
    static constexpr int kParts = kHeadDim / 64;  // of 16 columns, a warp's
    float max[2];
    float sum[4];        // a fragment of equal rows: ones x P^T
    float o[kParts][4];  // O^T: column lane / 4 and 8 more, heads 2 * (lane % 4) and the next

    // Depends on all values that were added.
    __device__ float last_values() const {
        uint32_t bits = 0;
#pragma unroll
        for (const auto& part : o) bits |= __float_as_uint(part[0]);
        return __uint_as_float(bits);
    }

    __device__ static GroupState empty() { return {{-INFINITY, -INFINITY}, {}, {}}; }

    // The first of the 16 columns of part `part`.
    __device__ static int column(int warp, int part) { return (warp % kWarpsPerTile * kParts + part) * 16; }
};

// Where a lane finds its rows of the K and V slices in a staged tile.
template <int kHeadDim>
struct SliceAddress {
    uint32_t k_row, k_chunk, v[kHeadDim / 64];

    __device__ SliceAddress(int warp, int lane) {
        k_row = (warp % kWarpsPerTile * kSliceTokens + (lane & 15)) * kStagedRowBytes;
        k_chunk = ((lane >> 4) ^ (lane & 7)) * 16;
#pragma unroll
        for (int part = 0; part < kHeadDim / 64; ++part) {
            const int columns = GroupState<kHeadDim>::column(warp, part) / 16;
            v[part] = columns / 4 * (kBlockSize * kStagedRowBytes) +
                      ((lane & 7) + ((lane >> 4) & 1) * 8) * kStagedRowBytes +
                      (((((lane >> 3) & 1) ^ (lane & 7)) * 16) ^ (columns % 4 * 32));
        }
    }
    // The warp's 16 tokens x columns 16 i..
    __device__ uint32_t k(int i) const {
        return i / 4 * (kBlockSize * kStagedRowBytes) + k_row + (k_chunk ^ (i % 4 * 32));
    }
    // Columns of the warp x 16 tokens of a slice, transposed
    __device__ uint32_t values(int part, int slice) const { return v[part] + slice * kSliceTokens * kStagedRowBytes; }
};

// Scores of the warp's slice of the K tile at `tile`.
template <typename T, int kHeadDim>
__device__ __forceinline__ void slice_scores(float (&s)[4], const QueryFragments<kHeadDim>& q, uint32_t tile,
                                             const SliceAddress<kHeadDim>& at) {
    float chain[4][4] = {};  // four chains of products, for a quarter of the latency
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t k[4];
        common::ldmatrix_x4(k, tile + at.k(i));
        common::mma<T>(chain[i % 4], k, q.b[i][0], q.b[i][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = (chain[0][i] + chain[1][i]) + (chain[2][i] + chain[3][i]);
}

// Scales the scores, silences those of tokens >= `tokens` of the slice, and tells the others the largest of each head.
__device__ __forceinline__ void exchange_max(float (&s)[4], int tokens, float scale_log2, TileExchange& exchange,
                                             int slice, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = lane / 4 + i / 2 * 8 < tokens ? s[i] * scale_log2 : -INFINITY;
    float2 top = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        top.x = fmaxf(top.x, __shfl_xor_sync(~0u, top.x, distance));
        top.y = fmaxf(top.y, __shfl_xor_sync(~0u, top.y, distance));
    }
    if (lane < 4) *reinterpret_cast<float2*>(&exchange.max[slice][2 * lane]) = top;
}

// After all maxima are there: tells the others the weights of the slice, and moves the state to the new maximum.
template <typename T, int kHeadDim>
__device__ __forceinline__ void exchange_weights(GroupState<kHeadDim>& state, float (&s)[4], TileExchange& exchange,
                                                 int slice, int lane) {
    float2 part[kWarpsPerTile];
#pragma unroll
    for (int i = 0; i < kWarpsPerTile; ++i)
        part[i] = *reinterpret_cast<const float2*>(&exchange.max[i][2 * (lane & 3)]);
    const float max[2] = {fmaxf(fmaxf(fmaxf(part[0].x, part[1].x), fmaxf(part[2].x, part[3].x)), state.max[0]),
                          fmaxf(fmaxf(fmaxf(part[0].y, part[1].y), fmaxf(part[2].y, part[3].y)), state.max[1])};
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = exp2_fast(s[i] - max[i % 2]);
    uint32_t* row = reinterpret_cast<uint32_t*>(&exchange.weights[slice * kSliceTokens + lane / 4]) + (lane & 3);
    row[0] = common::Pack<T>::from_floats(s[0], s[1]);
    row[8 * 4] = common::Pack<T>::from_floats(s[2], s[3]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float factor = exp2_fast(state.max[h] - max[h]);  // 0 from the empty state
        state.max[h] = max[h];
#pragma unroll
        for (int i = h; i < 4; i += 2) {
            state.sum[i] *= factor;
#pragma unroll
            for (int j = 0; j < GroupState<kHeadDim>::kParts; ++j) state.o[j][i] *= factor;
        }
    }
}

// After all weights are there: adds them up, and the values of the V tile at `tile` with them.
template <typename T, int kHeadDim>
__device__ __forceinline__ void add_values(GroupState<kHeadDim>& state, uint32_t weights, uint32_t tile,
                                           const SliceAddress<kHeadDim>& at, int lane) {
    const uint32_t one = common::Pack<T>::from_floats(1.0f, 1.0f), ones[4] = {one, one, one, one};
#pragma unroll
    for (int slice = 0; slice < kWarpsPerTile; slice += 2) {
        uint32_t p[4];  // P^T of two slices
        common::ldmatrix_x4_trans(p, weights + (slice * kSliceTokens + lane) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int part = 0; part < GroupState<kHeadDim>::kParts; ++part) {
                uint32_t v[4];
                common::ldmatrix_x4_trans(v, tile + at.values(part, slice + i));
                common::mma<T>(state.o[part], v, p[2 * i], p[2 * i + 1]);
            }
            common::mma<T>(state.sum, ones, p[2 * i], p[2 * i + 1]);
        }
    }
}

// A weight of zero does not silence a NaN beside it, so the values of absent tokens become zero: all but the first
// `tokens` of a slice of the V tile at `tile`.
template <int kHeadDim>
__device__ __forceinline__ void clear_values(uint32_t tile, int tokens, int slice, int lane) {
    constexpr int kChunks = kHeadDim / 8;
#pragma unroll 1
    for (int i = max(tokens, 0) * kChunks + lane; i < kSliceTokens * kChunks; i += 32) {
        const int token = i / kChunks, chunk = i % kChunks;
        const uint32_t place = tile + chunk / 8 * (kBlockSize * kStagedRowBytes) +
                               (slice * kSliceTokens + token) * kStagedRowBytes + chunk % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(place), "r"(0) : "memory");
    }
    common::fence_async_proxy();  // before the copy engine writes there again
}

// What a thread holds of a unit in the end: heads 2 * (lane % 4) and the next, columns lane / 4 and 8 more of 16.
struct Result {
    float max[2], sum[2];
    float o[4];

    // Adds another part of the unit; either may be empty, not both.
    __device__ __forceinline__ void add(float4 state, float4 other) {
        const float theirs[2] = {state.x, state.z}, their_sum[2] = {state.y, state.w};
        const float their_o[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float top = fmaxf(max[h], theirs[h]);
            const float own = exp2_fast(max[h] - top), factor = exp2_fast(theirs[h] - top);
            max[h] = top;
            sum[h] = sum[h] * own + their_sum[h] * factor;
            o[h] = o[h] * own + their_o[h] * factor;
            o[h + 2] = o[h + 2] * own + their_o[h + 2] * factor;
        }
    }
};

// The two tile groups give each other half of their columns, or, where a warp has but 16, the second group gives the
// first one all. The two warps that hold the same columns do so by themselves: each has all of its group's softmax
// state. `sync` is their barrier. Returns the first of the 16 columns that `result` is for; -1: none.
template <int kHeadDim, typename Sync>
__device__ __forceinline__ int merge_groups(Result& result, const GroupState<kHeadDim>& state, GroupExchange& exchange,
                                            Sync sync, int warp, int lane) {
    constexpr bool kSwap = kHeadDim == 128;
    const int group = warp / kWarpsPerTile;
    const auto part = [&](bool second) {
        const float (&a)[4] = state.o[0], (&b)[4] = state.o[GroupState<kHeadDim>::kParts - 1];
        return second ? float4{b[0], b[1], b[2], b[3]} : float4{a[0], a[1], a[2], a[3]};
    };
    if (kSwap || group == 1) exchange.o[warp][lane] = part(group == 0);
    if (lane < 4) exchange.state[warp][lane] = {state.max[0], state.sum[0], state.max[1], state.sum[1]};
    sync();
    if (!kSwap && group == 1) return -1;
    const float4 mine = part(group == 1);
    result = {{state.max[0], state.max[1]}, {state.sum[0], state.sum[1]}, {mine.x, mine.y, mine.z, mine.w}};
    const int other = warp ^ kWarpsPerTile;
    result.add(exchange.state[other][lane & 3], exchange.o[other][lane]);
    return GroupState<kHeadDim>::column(warp, kSwap ? group : 0);
}

}  // namespace decode_attn
