// The query's fragments, straight from global memory; in the fused kernel rotated on the way, and with them the new
// token: its key is rotated and appended, its value appended, and both enter the softmax as a slice of one token.
#pragma once
#include "decode_attn/tile_math.cuh"

namespace decode_attn {

// One head's vector as 16-column fragments: columns 16 i + c and 16 i + 8 + c, c = 2 * (lane % 4). `head` null: zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_vector(uint32_t (&b)[kHeadDim / 16][2], const T* head, int lane) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            b[i][half] =
                head ? __ldg(reinterpret_cast<const uint32_t*>(head + 16 * i + 8 * half + 2 * (lane & 3))) : 0u;
        }
    }
}

// RoPE, half-split layout: column d turns with column d + head_dim / 2, which the same thread holds. fp32, then rounded
// once.
template <typename T, int kHeadDim>
__device__ __forceinline__ void rotate(uint32_t (&b)[kHeadDim / 16][2], const float* cos, const float* sin, int lane) {
    constexpr int kHalf = kHeadDim / 32;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = 16 * i + 8 * half + 2 * (lane & 3);
            const float2 c = __ldg(reinterpret_cast<const float2*>(cos + column));
            const float2 s = __ldg(reinterpret_cast<const float2*>(sin + column));
            const float2 x = common::Pack<T>::to_floats(b[i][half]), y = common::Pack<T>::to_floats(b[i + kHalf][half]);
            b[i][half] = common::Pack<T>::from_floats(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y);
            b[i + kHalf][half] = common::Pack<T>::from_floats(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y);
        }
    }
}

template <typename T, int kHeadDim, bool kFused>
__device__ __forceinline__ void load_query(QueryFragments<kHeadDim>& q, const Params& p, int row, int kv_head,
                                           int position, int lane) {
    const int head = lane / 4;  // within the group
    const T* source = static_cast<const T*>(p.q) + row * p.stride_q_row + (kv_head * p.group + head) * p.stride_q_head;
    load_vector<T, kHeadDim>(q.b, head < p.group ? source : nullptr, lane);
    if constexpr (kFused) {
        rotate<T, kHeadDim>(q.b, p.cos + int64_t(position) * (kHeadDim / 2), p.sin + int64_t(position) * (kHeadDim / 2),
                            lane);
    }
}

// Appends the new token of (row, kv_head) to the cache, in KV block `block`, and adds it to the state of the calling
// warp.
template <typename T, int kHeadDim>
__device__ void attend_new_token(WarpState<kHeadDim>& state, const QueryFragments<kHeadDim>& q, const Params& p,
                                 int row, int kv_head, int position, int block, int lane) {
    const int num_heads = p.num_kv_heads * p.group, r = lane / 4, c = 2 * (lane & 3);
    const T* qkv = static_cast<const T*>(p.q) + row * p.stride_q_row;
    const T* k_new = qkv + (num_heads + kv_head) * kHeadDim;
    const T* v_new = k_new + p.num_kv_heads * kHeadDim;
    const int64_t token = position % kBlockSize;
    T* k_target = static_cast<T*>(const_cast<void*>(p.k_cache)) + block * p.stride_k_block + kv_head * p.stride_k_head +
                  token * p.stride_k_token;
    T* v_target = static_cast<T*>(const_cast<void*>(p.v_cache)) + block * p.stride_v_block + kv_head * p.stride_v_head +
                  token * p.stride_v_token;

    uint32_t k[kHeadDim / 16][2];  // every group of four lanes holds the whole key
    load_vector<T, kHeadDim>(k, k_new, lane);
    rotate<T, kHeadDim>(k, p.cos + int64_t(position) * (kHeadDim / 2), p.sin + int64_t(position) * (kHeadDim / 2),
                        lane);
    float s[4] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        const uint32_t a[4] = {r == 0 ? k[i][0] : 0u, 0u, r == 0 ? k[i][1] : 0u, 0u};  // the token is row 0 of 16
        common::mma<T>(s, a, q.b[i][0], q.b[i][1]);
        if (r == i % 8) {
            *reinterpret_cast<uint32_t*>(k_target + 16 * i + c) = k[i][0];
            *reinterpret_cast<uint32_t*>(k_target + 16 * i + 8 + c) = k[i][1];
        }
    }
    uint32_t p0, p1;
    slice_softmax<T>(state, s, 1, p.scale_log2, lane, p0, p1);
    uint32_t v[kHeadDim / 64];  // columns 64 i + 2 lane and the next
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) {
        v[i] = __ldg(reinterpret_cast<const uint32_t*>(v_new) + 32 * i + lane);
        reinterpret_cast<uint32_t*>(v_target)[32 * i + lane] = v[i];
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16;
         ++i) {  // columns 16 i + r and 16 i + 8 + r, as token 0: lower half of the lanes with c = 0
        uint32_t a[4] = {0u, 0u, 0u, 0u};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = __shfl_sync(~0u, v[i / 4], (8 * i + 4 * half + r / 2) % 32);
            a[half] = c == 0 ? (r & 1 ? pair >> 16 : pair & 0xffffu) : 0u;
        }
        common::mma<T>(state.o[i], a, p0, p1);
    }
}

}  // namespace decode_attn
