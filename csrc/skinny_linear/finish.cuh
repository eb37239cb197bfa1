// From the warps' partial sums to the output: over the warps of the block, over the blocks of the cluster, then the
// form's epilogue. Every sum is taken in a fixed order, so that a repeat is bitwise equal.
#pragma once
#include "common/cluster.cuh"
#include "common/types.cuh"
#include "skinny_linear/multiply.cuh"

namespace skinny_linear {

// One block's view.
struct Block {
    uint8_t* memory;
    uint32_t base;  // its shared address
    const SharedLayout& layout;
    int rank, first_step, steps;  // in the cluster; its part of the columns

    template <typename T>
    __device__ T* at(int offset) const {
        return reinterpret_cast<T*>(memory + offset);
    }
    __device__ uint32_t full(int stage) const { return base + layout.barriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return base + layout.barriers + (kMaxStages + stage) * 8; }
    __device__ uint32_t sent() const { return base + layout.barriers + 2 * kMaxStages * 8; }
};

// One (token, unit of rows) pair of a tile; a unit becomes 16 bytes of output. Block `owner` of the cluster finishes
// own_units neighbouring units of every token. Numbered so that neighbours are neighbours in memory and nothing has to
// be divided: some numbers are of nothing.
template <Form kForm, int kTokens>
struct Item {
    static constexpr int kUnit = unit_rows(kForm);
    int own_unit, token, unit;

    __device__ Item(const Params& p, int number, int owner)
        : own_unit(number & ((1 << p.unit_bits) - 1)),
          token(number >> p.unit_bits),
          unit(owner * p.own_units + own_unit) {}

    static_assert((kTokens & (kTokens - 1)) == 0);
    static __device__ int count(const Params& p) { return kTokens << p.unit_bits; }
    __device__ bool exists(const Params& p) const {
        return own_unit < p.own_units && unit * kUnit < p.tile_rows && token < p.num_tokens;
    }
    // Of its 16 bytes in out and residual, in elements; negative if the tile reaches beyond the matrix here.
    __device__ int64_t index(const Params& p, int tile) const {
        const int row = tile * p.tile_rows + unit * kUnit;
        if (!exists(p) || row >= p.num_rows) return -1;
        constexpr int kPerOutput = kUnit / 8;
        return (int64_t(token) * p.num_rows + row) / kPerOutput;
    }
    // Of its sums among those that block `from` sent, in floats.
    __device__ int place(const Params& p, int from) const {
        return ((from * p.num_tokens + token) * p.own_units + own_unit) * kUnit;
    }
};

template <int kUnit>
__device__ __forceinline__ void add_floats(float (&sum)[kUnit], const float* from) {
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        sum[i] += v.x, sum[i + 1] += v.y, sum[i + 2] += v.z, sum[i + 3] += v.w;
    }
}

// A unit of a token, summed over the warps that share its columns.
template <int kColumnWarps, int kTokens, int kUnit>
__device__ __forceinline__ void sum_warps(const Block& b, int token, int unit, float (&sum)[kUnit]) {
    const int stride = b.layout.stride_partial;
    const float* from = b.at<float>(b.layout.partials) + token * stride + unit * kUnit;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) add_floats<kUnit>(sum, from + w * kTokens * stride);
}

template <int kColumnWarps, int kTokens>
__device__ __forceinline__ float sum_squares(const Block& b, int token) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) sum += b.at<float>(b.layout.squares)[w * kTokens + token];
    return sum;
}

// Every unit's sum to the block that finishes it, and the tokens' squares to all.
template <Form kForm, int kColumnWarps, int kTokens>
__device__ __forceinline__ void send_sums(const Params& p, const Block& b) {
    using It = Item<kForm, kTokens>;
    const uint32_t barrier = b.sent() - b.base;
    // All owners' items at a time: those of one are fewer than there are threads. Their number is a power of two.
    const int count = It::count(p);
#pragma unroll 1
    for (int i = threadIdx.x; i < p.splits * count; i += kConsumers) {
        const int number = i & (count - 1), owner = (i - number) / kTokens >> p.unit_bits;
        const It item(p, number, owner);
        if (!item.exists(p)) continue;
        float sum[It::kUnit] = {};
        sum_warps<kColumnWarps, kTokens>(b, item.token, item.unit, sum);
        const uint32_t to = common::in_block(b.base, owner), at = to + b.layout.received + item.place(p, b.rank) * 4;
#pragma unroll
        for (int k = 0; k < It::kUnit; k += 4)
            common::send(at + k * 4, to + barrier, sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
    }
    if constexpr (has_norm(kForm)) {
#pragma unroll 1
        for (int i = threadIdx.x; i < p.splits * kTokens; i += kConsumers) {
            const int token = i % kTokens;
            if (token >= p.num_tokens) continue;
            const uint32_t to = common::in_block(b.base, i / kTokens);
            common::send(to + b.layout.received_squares + (b.rank * p.num_tokens + token) * 4, to + barrier,
                         sum_squares<kColumnWarps, kTokens>(b, token));
        }
    }
}

// Bytes that send_sums of all blocks brings to this one.
template <Form kForm>
__device__ __forceinline__ int sent_bytes(const Params& p, int rank) {
    const int units = p.tile_rows / unit_rows(kForm), own = max(0, min(p.own_units, units - rank * p.own_units));
    return p.splits * p.num_tokens * (own * unit_rows(kForm) + has_norm(kForm)) * 4;
}

template <Form kForm>
__device__ __forceinline__ uint4 load_residual(const Params& p, int64_t index) {
    if (kForm != Form::kLinearAdd || index < 0) return {};
    return *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.residual) + index);
}

template <Form kForm>
__device__ __forceinline__ void write_output(const Params& p, int64_t index, const float (&sum)[unit_rows(kForm)],
                                             float squares, const uint4& residual) {
    using Pack = common::Pack<bf16>;
    float y[8];
    if constexpr (kForm == Form::kLinearAdd) {
        const uint32_t added[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const float2 pair = Pack::to_floats(added[i / 2]);
            y[i] = sum[i] + pair.x, y[i + 1] = sum[i + 1] + pair.y;
        }
    } else {
        const float scale = rsqrtf(squares / p.size + p.eps);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            y[i] = sum[i] * scale;
            if constexpr (kForm == Form::kNormSwiGlu) y[i] = __fdividef(y[i], 1 + __expf(-y[i])) * sum[8 + i] * scale;
        }
    }
    *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + index) = {
        Pack::from_floats(y[0], y[1]), Pack::from_floats(y[2], y[3]), Pack::from_floats(y[4], y[5]),
        Pack::from_floats(y[6], y[7])};
}

// residual: of this thread's first item.
template <Form kForm, int kColumnWarps, int kTokens>
__device__ __forceinline__ void finish_tile(const Params& p, const Block& b, int tile, uint4 residual) {
    using It = Item<kForm, kTokens>;
    if (p.splits > 1) {
        send_sums<kForm, kColumnWarps, kTokens>(p, b);
        common::wait_for_cluster(b.sent());
    }
    const int count = It::count(p);
#pragma unroll 1
    for (int number = threadIdx.x; number < count; number += kConsumers) {
        const It item(p, number, b.rank);
        const int64_t index = item.index(p, tile);
        if (index < 0) continue;
        if (number != threadIdx.x) residual = load_residual<kForm>(p, index);
        float sum[It::kUnit] = {}, squares = 0;
        if (p.splits == 1) {
            sum_warps<kColumnWarps, kTokens>(b, item.token, item.unit, sum);
            if (has_norm(kForm)) squares = sum_squares<kColumnWarps, kTokens>(b, item.token);
        } else {
#pragma unroll 2
            for (int from = 0; from < p.splits; ++from) {
                add_floats<It::kUnit>(sum, b.at<float>(b.layout.received) + item.place(p, from));
                if (has_norm(kForm))
                    squares += b.at<float>(b.layout.received_squares)[from * p.num_tokens + item.token];
            }
        }
        write_output<kForm>(p, index, sum, squares, residual);
    }
}

}  // namespace skinny_linear
