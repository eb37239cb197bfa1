// From the tensor cores' sums to the output: over the blocks of the cluster, then the form's epilogue. Every sum is
// taken in a fixed order, so that a repeat is bitwise equal.
//
// A warp holds 16 rows of weight, a unit, for all tokens, in fragments of 16 rows by 8 tokens (common/wgmma.cuh): a
// lane has rows r and r + 8 of tokens t and t + 1, r = lane / 4, t = 2 (lane % 4).
#pragma once
#include "batch_linear/params.h"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"

namespace batch_linear {

using Pack = common::Pack<__nv_bfloat16>;

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

// Where a block of the cluster receives, and which units it finishes.
template <int kTokens>
struct Receiver {
    int first, units;  // its units
    int before;        // steps that it takes before the stages that receive are read for the last time
    int start, stages;

    __device__ Receiver(const Params& p, int rank) : stages(p.stages) {
        first = first_of(p.units, rank, p.splits);
        units = first_of(p.units, rank + 1, p.splits) - first;
        const int steps = first_of(p.steps, rank + 1, p.splits) - first_of(p.steps, rank, p.splits);
        before = steps - stages;  // negative: the last stage is never filled
        start = before < 0 ? stages - 1 : before % stages;
    }
    // The step after which peers may send; -1: before the first. Without units of its own a block receives in no stage.
    __device__ int last_step(const Params& p) const {
        return max(before + receiving_stages(p.tile_rows, kTokens, p.splits, units), 0) - 1;
    }
    // The offset of one source's unit.
    __device__ int place(const Params& p, int source, int unit) const {
        const int per_stage = units_per_stage(p.tile_rows, kTokens), index = source * units + unit;
        int stage = start + index / per_stage;
        if (stage >= stages) stage -= stages;
        return stage * stage_bytes(p.tile_rows, kTokens) + index % per_stage * unit_bytes(kTokens);
    }
};

// Tells every block of the cluster that they may send to this one: a lane of each warp each.
__device__ __forceinline__ void allow_sending(const Params& p, const Block& b, int lane) {
    common::cluster_wait();  // the other blocks' barriers exist
    if (lane < p.splits) common::arrive_remote(common::in_block(b.drained(), lane));
}

// Bytes that the blocks of the cluster, this one included, send to this one.
template <int kTokens>
__device__ __forceinline__ int sent_bytes(const Params& p, const Block& b) {
    const int units = first_of(p.units, b.rank + 1, p.splits) - first_of(p.units, b.rank, p.splits);
    return p.splits * units * unit_bytes(kTokens);
}

// What a lane needs beside its sums, of linear_add: two neighbouring rows of one token, and those 8 rows on.
struct Added {
    uint2 residual, next_norm;
};

// Where a lane's part of a fragment goes: two neighbouring outputs of token lane / 4, for linear_add and norm_linear
// also those 8 rows on. SwiGLU makes one output of rows r and r + 8.
template <Form kForm>
struct Target {
    int token, row;
    int64_t index;  // in out and residual, in elements; negative: nowhere

    __device__ Target(const Params& p, const Block& b, int unit, int pair, int lane)
        : token(pair * 8 + lane / 4), row(b.tile * p.tile_rows + unit * kUnitRows) {
        const bool exists = token < p.num_tokens && row < p.num_rows;
        const int64_t first = (int64_t(token) * p.num_rows + row) / rows_per_output(kForm);
        index = exists ? first + lane % 4 * 2 : -1;
    }
    __device__ __forceinline__ Added load_added(const Params& p, int lane) const {
        if (kForm != Form::kLinearAdd || index < 0) return {};
        const auto load = [](const void* vector, int64_t at) -> uint2 {
            const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(vector) + at);
            return {from[0], from[4]};
        };
        return {load(p.residual, index), p.next_norm ? load(p.next_norm, row + lane % 4 * 2) : uint2{}};
    }
    // The parts of the norm that follows, of what was written: rows of one token in words of two.
    __device__ __forceinline__ void prepare_norm(const Params& p, uint32_t low, uint32_t high, uint2 norm,
                                                 int lane) const {
        const float2 a = Pack::to_floats(low), b = Pack::to_floats(high);
        float squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(b.x, b.x, b.y * b.y)));
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        if (index < 0) return;
        auto* to = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.parts.weighted) + index);
        to[0] = common::multiply_pairs(low, norm.x), to[4] = common::multiply_pairs(high, norm.y);
        if (lane % 4 == 0) p.parts.squares[row / kUnitRows * p.num_tokens + token] = squares;
    }
    __device__ __forceinline__ void write(const Params& p, const Block& b, float4 v, const Added& added, int pair,
                                          int lane) const {
        auto* to = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.out) + index);
        if constexpr (has_norm(kForm)) {
            const float2 scale = *reinterpret_cast<const float2*>(&b.own().scale[pair * 8 + lane % 4 * 2]);
            v.x *= scale.x, v.y *= scale.y, v.z *= scale.x, v.w *= scale.y;
        }
        if constexpr (kForm == Form::kNormSwiGlu) {
            const float x = __fdividef(v.x, 1 + __expf(-v.x)) * v.z, y = __fdividef(v.y, 1 + __expf(-v.y)) * v.w;
            const uint32_t word = common::transpose_8x8(Pack::from_floats(x, y));
            if (index >= 0) to[0] = word;
        } else {
            if constexpr (kForm == Form::kLinearAdd) {
                const float2 low = Pack::to_floats(common::transpose_8x8(added.residual.x));
                const float2 high = Pack::to_floats(common::transpose_8x8(added.residual.y));
                v.x += low.x, v.y += low.y, v.z += high.x, v.w += high.y;
            }
            const uint32_t low = common::transpose_8x8(Pack::from_floats(v.x, v.y));
            const uint32_t high = common::transpose_8x8(Pack::from_floats(v.z, v.w));
            if (index >= 0) to[0] = low, to[4] = high;
            if (kForm == Form::kLinearAdd && p.next_norm) prepare_norm(p, low, high, added.next_norm, lane);
        }
    }
};

// Sums of a warp's units: number k is unit `warp` + 8 k of the tile.
template <int kTokens, bool kTall>
struct Sums {
    static constexpr int kUnits = kTall ? 2 : 1;
    float d[kUnits][kTokens / 2];

    // Calls use(unit, its sums) for those that the tile has.
    template <typename Use>
    __device__ __forceinline__ void each(const Params& p, int warp, Use use) const {
        if (warp < p.units) use(warp, d[0]);
        if constexpr (kTall)
            if (warp + kConsumerWarps < p.units) use(warp + kConsumerWarps, d[1]);
    }
};

// The warps of a block share the fragments that it finishes: warp w takes w, w + 8, ... of [own unit][tokens / 8].
template <int kTokens, Form kForm, bool kTall>
struct Finisher {
    static constexpr int kPairs = kTokens / 8;
    static constexpr int kAhead = kForm == Form::kLinearAdd ? 2 : 0;  // fragments whose Added is asked for early
    const Params& p;
    const Block& b;
    const Receiver<kTokens> own;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    Added added[kAhead + 1];

    __device__ Finisher(const Params& p, const Block& b) : p(p), b(b), own(p, b.rank) {}

    __device__ __forceinline__ Target<kForm> target(int item) const {
        return {p, b, own.first + item / kPairs, item % kPairs, lane};
    }

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int item = warp + i * kConsumerWarps;
            added[i] = item < own.units * kPairs ? target(item).load_added(p, lane) : Added{};
        }
    }

    __device__ __forceinline__ void wait_for_scales() {
        if constexpr (has_norm(kForm)) common::named_sync(1, kConsumers + kScaleThreads);
    }

    // All there is to sum is in this block.
    __device__ __forceinline__ void finish_alone(const Sums<kTokens, kTall>& sums) {
        wait_for_scales();
        sums.each(p, warp, [&](int unit, const float (&d)[kTokens / 2]) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const Target<kForm> to(p, b, unit, j, lane);
                to.write(p, b, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}, to.load_added(p, lane), j, lane);
            }
        });
    }

    // Every warp's fragments to the block that finishes its unit.
    __device__ __forceinline__ void send_sums(const Sums<kTokens, kTall>& sums) {
        common::wait_for_cluster(b.drained());
        sums.each(p, warp, [&](int unit, const float (&d)[kTokens / 2]) {
            const int owner = owner_of(unit, p.units, p.splits);
            const Receiver<kTokens> receiver(p, owner);
            const uint32_t to = common::in_block(b.base, owner), barrier = to + b.received() - b.base;
            const uint32_t place = to + receiver.place(p, b.rank, unit - receiver.first) + lane * 16;
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
                common::send(place + j * 512, barrier, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        });
    }

    __device__ __forceinline__ float4 received_sum(int item) const {
        const int unit = item / kPairs, offset = (item % kPairs * 32 + lane) * 16;
        float4 v = *b.at<float4>(own.place(p, 0, unit) + offset);
#pragma unroll 4
        for (int source = 1; source < p.splits; ++source) {
            const float4 more = *b.at<float4>(own.place(p, source, unit) + offset);
            v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
        }
        return v;
    }

    __device__ __forceinline__ void finish_received() {
        wait_for_scales();
        common::wait_for_cluster(b.received());
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int item = warp + i * kConsumerWarps;
            if (item < own.units * kPairs) target(item).write(p, b, received_sum(item), added[i], item % kPairs, lane);
        }
#pragma unroll 1
        for (int item = warp + kAhead * kConsumerWarps; item < own.units * kPairs; item += kConsumerWarps) {
            const Target<kForm> to = target(item);
            const Added loaded = to.load_added(p, lane);
            to.write(p, b, received_sum(item), loaded, item % kPairs, lane);
        }
    }
};

}  // namespace batch_linear
