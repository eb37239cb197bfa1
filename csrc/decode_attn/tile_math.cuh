// One warp's mathematics on 16 tokens (a slice) of one unit, all query heads of the group at once.
//
// S^T [16 tokens x 8 heads] = K Q^T, then O^T [head_dim x 8 heads] += V^T P^T: tokens and columns fill the 16-wide side
// of the tensor-core tile, heads its 8-wide side, so a group of 8 wastes nothing. A thread holds the heads 2 * (lane %
// 4) and the next one, in S^T and in O^T alike, so the softmax factors never move between threads.
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

// What a warp has gathered for a unit. `sum` counts only this thread's tokens until reduce().
template <int kHeadDim>
struct WarpState {
    SoftmaxState head[2];
    float o[kHeadDim / 16][4];

    __device__ void init() {
        head[0] = head[1] = SoftmaxState::empty();
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    }

    // Adds up the sums of the eight threads that share a head.
    __device__ void reduce() {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            head[0].sum += __shfl_xor_sync(~0u, head[0].sum, distance);
            head[1].sum += __shfl_xor_sync(~0u, head[1].sum, distance);
        }
    }
};

// Where a lane finds its rows of the K and V slices in a stage.
struct SliceAddress {
    uint32_t k_row, k_chunk, v_row, v_chunk;

    // `slice` = which 16 tokens of the tile
    __device__ SliceAddress(int slice, int lane) {
        k_row = (slice * kSliceTokens + (lane & 15)) * kStagedRowBytes;
        k_chunk = ((lane >> 4) ^ (lane & 7)) * 16;
        v_row = (slice * kSliceTokens + (lane & 7) + ((lane >> 4) & 1) * 8) * kStagedRowBytes;
        v_chunk = (((lane >> 3) & 1) ^ (lane & 7)) * 16;
    }
    // K: 16 tokens x columns 16 i..; V: transposed, columns 16 i.. x 16 tokens
    __device__ uint32_t k(int i) const {
        return (i / 4) * (kBlockSize * kStagedRowBytes) + k_row + (k_chunk ^ ((i & 3) * 32));
    }
    __device__ uint32_t v(int i) const {
        return (i / 4) * (kBlockSize * kStagedRowBytes) + v_row + (v_chunk ^ ((i & 3) * 32));
    }
};

// Softmax of a slice's scores s (S^T fragment, unscaled) and their move to P^T. Tokens >= `tokens` of the 16 count as
// absent.
template <typename T, int kHeadDim>
__device__ __forceinline__ void slice_softmax(WarpState<kHeadDim>& state, float (&s)[4], int tokens, float scale_log2,
                                              int lane, uint32_t& p0, uint32_t& p1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = lane / 4 + (i / 2) * 8 < tokens ? s[i] * scale_log2 : -INFINITY;
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float top = fmaxf(s[h], s[h + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
        factor[h] = state.head[h].rescale(fmaxf(state.head[h].max, top));
        s[h] = exp2_fast(s[h] - state.head[h].max);
        s[h + 2] = exp2_fast(s[h + 2] - state.head[h].max);
        state.head[h].sum += s[h] + s[h + 2];
    }
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) state.o[i][j] *= factor[j & 1];
        }
    }
    p0 = common::transpose_8x8(common::Pack<T>::from_floats(s[0], s[1]));
    p1 = common::transpose_8x8(common::Pack<T>::from_floats(s[2], s[3]));
}

// Bits of the A registers (a0, a1: tokens c, c + 1; a2, a3: 8 more) that belong to the first `tokens` tokens of a
// slice. A weight of zero does not silence a NaN beside it, so absent values are masked, not multiplied.
__device__ __forceinline__ void value_masks(int tokens, int lane, uint32_t& low, uint32_t& high) {
    const int c = 2 * (lane & 3);
    low = (c < tokens ? 0x0000ffffu : 0u) | (c + 1 < tokens ? 0xffff0000u : 0u);
    high = (c + 8 < tokens ? 0x0000ffffu : 0u) | (c + 9 < tokens ? 0xffff0000u : 0u);
}

// Takes the slice at `stage` (shared address of a K tile, its V tile behind it), of which the first `tokens` (>= 1)
// exist.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend_slice(WarpState<kHeadDim>& state, const QueryFragments<kHeadDim>& q,
                                             uint32_t stage, const SliceAddress& at, int tokens, float scale_log2,
                                             int lane) {
    float s[4] = {}, chain[3][4] = {};  // four chains of products, for a quarter of the latency
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t k[4];
        common::ldmatrix_x4(k, stage + at.k(i));
        common::mma<T>(i % 4 ? chain[i % 4 - 1] : s, k, q.b[i][0], q.b[i][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = (s[i] + chain[0][i]) + (chain[1][i] + chain[2][i]);
    uint32_t p0, p1, low, high;
    slice_softmax<T>(state, s, tokens, scale_log2, lane, p0, p1);
    value_masks(tokens, lane, low, high);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t v[4];
        common::ldmatrix_x4_trans(v, stage + tile_bytes(kHeadDim) + at.v(i));
        v[0] &= low;
        v[1] &= low;
        v[2] &= high;
        v[3] &= high;
        common::mma<T>(state.o[i], v, p0, p1);
    }
}

}  // namespace decode_attn
