// From the tensor cores' sums to the output: over the blocks of the cluster, then the form's epilogue. Every sum is
// taken in a fixed order, so that a repeat is bitwise equal.
#pragma once
#include "batch_linear/cluster.cuh"
#include "batch_linear/params.h"
#include "common/async.cuh"
#include "common/types.cuh"

namespace batch_linear {

// One block's view.
struct Block {
    uint8_t* memory;
    uint32_t base;                      // its shared address
    int tail;                           // offset
    int tile, rank, first_step, steps;  // its tile, its place in the cluster, its part of the columns

    template <typename T>
    __device__ T* at(int offset) const {
        return reinterpret_cast<T*>(memory + offset);
    }
    __device__ Tail& own() const { return *at<Tail>(tail); }
    __device__ uint32_t full(int stage) const { return base + tail + uint32_t(offsetof(Tail, full)) + stage * 8; }
    __device__ uint32_t empty(int stage) const { return base + tail + uint32_t(offsetof(Tail, empty)) + stage * 8; }
    __device__ uint32_t drained() const { return base + tail + uint32_t(offsetof(Tail, drained)); }
    __device__ uint32_t received() const { return base + tail + uint32_t(offsetof(Tail, received)); }
};

__device__ __forceinline__ void load_shared(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Two bf16 products, each rounded once.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&product);
}

// 16 bytes of output: 8 neighbouring outputs of a token, numbered over the tokens of what a block finishes.
template <Form kForm>
struct Item {
    static constexpr int kUnitChunks = kUnitRows / rows_per_output(kForm) / 8;
    int token, chunk;
    int64_t index;  // in out and residual, in elements; negative if there is no such item

    __device__ Item(const Params& p, const Block& b, int number) {
        const int first = first_unit(b.rank, p.splits), units = first_unit(b.rank + 1, p.splits) - first;
        const int chunks = units * kUnitChunks;
        token = number / chunks, chunk = number - token * chunks;
        const int row = b.tile * kTileRows + first * kUnitRows + chunk * 8 * rows_per_output(kForm);
        const int outputs = p.num_rows / rows_per_output(kForm);
        const bool exists = token < p.num_tokens && row < p.num_rows;
        index = exists ? int64_t(token) * outputs + row / rows_per_output(kForm) : -1;
    }
};

template <Form kForm>
__device__ __forceinline__ uint4 load_residual(const Params& p, int64_t index) {
    if (kForm != Form::kLinearAdd || index < 0) return {};
    return *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.residual) + index);
}

template <Form kForm>
__device__ __forceinline__ uint4 first_residual(const Params& p, const Block& b) {
    return load_residual<kForm>(p, Item<kForm>(p, b, threadIdx.x).index);
}

// Bytes that the blocks of the cluster, this one included, send to this one.
template <int kTokens, Form kForm>
__device__ __forceinline__ int sent_bytes(const Params& p, const Block& b) {
    const int units = first_unit(b.rank + 1, p.splits) - first_unit(b.rank, p.splits);
    return p.splits * kTokens * (units * kUnitRows + has_norm(kForm)) * 4;
}

// Four sums of a fragment, for rows r and r + 8 of a unit and tokens t and t + 1 (wgmma.cuh), to their places in
// [token][own rows]; SwiGLU makes one output of both rows.
template <Form kForm>
__device__ __forceinline__ void place_sums(const Params& p, const Block& b, float4 v, float* sums, int unit, int token,
                                           int row) {
    const int stride = stride_sums(p.splits);
    if constexpr (has_norm(kForm)) {
        const float2 scale = *reinterpret_cast<const float2*>(&b.own().scale[token]);
        v.x *= scale.x, v.y *= scale.y, v.z *= scale.x, v.w *= scale.y;
    }
    if constexpr (kForm == Form::kNormSwiGlu) {
        float* place = sums + token * stride + unit * (kUnitRows / 2) + row;
        place[0] = __fdividef(v.x, 1 + __expf(-v.x)) * v.z;
        place[stride] = __fdividef(v.y, 1 + __expf(-v.y)) * v.w;
    } else {
        float* place = sums + token * stride + unit * kUnitRows + row;
        place[0] = v.x, place[stride] = v.y;
        place[8] = v.z, place[stride + 8] = v.w;
    }
}

// Every warp's fragments to the block that finishes its unit, and the tokens' squares to all.
template <int kTokens, Form kForm, typename Share>
__device__ __forceinline__ void exchange(const Params& p, const Block& b, const float (&d)[kTokens / 2], Share& share) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    cluster_wait();  // the other blocks' barriers exist
    if (lane < p.splits) arrive_remote(in_block(b.drained(), lane));
    const int owner = owner_of(warp, p.splits), first = first_unit(owner, p.splits);
    const int units = first_unit(owner + 1, p.splits) - first;
    const uint32_t to = in_block(b.base, owner), barrier = to + b.received() - b.base;
    const uint32_t place = to + ((b.rank * units + warp - first) * (kTokens / 8) * 32 + lane) * 16;
    wait_for_cluster(b.drained());
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j)
        send(place + j * 512, barrier, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
    if constexpr (has_norm(kForm)) {
        share.sums(thread, [&](int token, float sum) {
            const uint32_t at = b.base + b.tail + uint32_t(offsetof(Tail, squares)) + (b.rank * kMaxTokens + token) * 4;
            for (int rank = 0; rank < p.splits; ++rank) send(in_block(at, rank), in_block(b.received(), rank), sum);
        });
    }
    wait_for_cluster(b.received());
}

template <int kTokens, Form kForm, typename Share>
__device__ __forceinline__ void finish(const Params& p, const Block& b, const float (&d)[kTokens / 2], Share& share,
                                       uint4 residual) {
    constexpr int kPairs = kTokens / 8;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int units = first_unit(b.rank + 1, p.splits) - first_unit(b.rank, p.splits);
    float* sums = b.at<float>(received_bytes(kTokens, p.splits));
    auto scale_of = [&](float squares) { return rsqrtf(squares / p.size + p.eps); };
    auto place = [&](float4 v, int unit, int j) {
        place_sums<kForm>(p, b, v, sums, unit, 8 * j + 2 * (lane % 4), lane / 4);
    };
    if (p.splits == 1) {
        if constexpr (has_norm(kForm))
            share.sums(thread, [&](int token, float sum) { b.own().scale[token] = scale_of(sum); });
        common::named_sync(1, kConsumers);  // the scales are there, and the ring is no longer read
#pragma unroll
        for (int j = 0; j < kPairs; ++j) place({d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}, warp, j);
    } else {
        exchange<kTokens, kForm>(p, b, d, share);
        if constexpr (has_norm(kForm)) {
            if (thread < kTokens) {
                float squares = 0;
                for (int rank = 0; rank < p.splits; ++rank) squares += b.own().squares[rank][thread];
                b.own().scale[thread] = scale_of(squares);
            }
            common::named_sync(1, kConsumers);
        }
#pragma unroll 1
        for (int item = warp; item < units * kPairs; item += kConsumerWarps) {
            const float4* from = b.at<float4>(0) + item * 32 + lane;
            float4 v = from[0];
#pragma unroll 4
            for (int rank = 1; rank < p.splits; ++rank) {
                const float4 more = from[rank * units * kPairs * 32];
                v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
            }
            place(v, item / kPairs, item % kPairs);
        }
    }
    common::named_sync(1, kConsumers);

    const int count = p.num_tokens * units * Item<kForm>::kUnitChunks;
#pragma unroll 1
    for (int number = thread; number < count; number += kConsumers) {
        const Item<kForm> item(p, b, number);
        if (item.index < 0) continue;
        if (number != thread) residual = load_residual<kForm>(p, item.index);
        const uint32_t added[4] = {residual.x, residual.y, residual.z, residual.w};
        const float* from = sums + item.token * stride_sums(p.splits) + item.chunk * 8;
        uint32_t y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 pair = reinterpret_cast<const float2*>(from)[i];
            if constexpr (kForm == Form::kLinearAdd) {
                const float2 more = common::Pack<__nv_bfloat16>::to_floats(added[i]);
                pair.x += more.x, pair.y += more.y;
            }
            y[i] = common::Pack<__nv_bfloat16>::from_floats(pair.x, pair.y);
        }
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + item.index) = {y[0], y[1], y[2], y[3]};
    }
}

}  // namespace batch_linear
