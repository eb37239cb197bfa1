// From the tensor cores' sums to the output: over the blocks of the cluster, then the form's epilogue. Every sum is
// taken in a fixed order, so that a repeat is bitwise equal.
#pragma once
#include "batch_linear/multiply.cuh"
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"

namespace batch_linear {

using Pack = common::Pack<__nv_bfloat16>;

// One block's view.
struct Block {
    uint8_t* memory;
    uint32_t base;                // its shared address
    int tail;                     // offset
    int first_row, rows;          // of weight, that it makes, perhaps with others of the cluster
    int rank, first_step, steps;  // its place in the cluster, its part of the columns; steps over all tiles

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
        const int bytes = p.weight_bytes, received = received_bytes(kTokens, p.splits, units);
        return max(before + min((received + bytes - 1) / bytes, stages), 0) - 1;
    }
    // The offset of one source's fragment in shared memory.
    __device__ int place(const Params& p, int source, int unit, int part) const {
        const int offset = (source * units + unit) * unit_bytes(kTokens) + part * kFragmentBytes;
        if (offset >= p.x_offset) return offset;
        const int place = start * p.weight_bytes + offset;
        return place < p.x_offset ? place : place - p.x_offset;
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
    return received_bytes(kTokens, p.splits, units);
}

__device__ __forceinline__ float silu(float x) {
    return __fdividef(x, 1 + __expf(-x));
}

// Where a fragment goes: a lane writes two neighbouring outputs of tokens t and t + 8, t = lane / 4, and those 8 rows
// on, but for SwiGLU, which makes one output of rows r and r + 8.
template <Form kForm, bool kTokensAreRows>
struct Target {
    static constexpr int kWords = kForm == Form::kNormSwiGlu ? 1 : 2;  // of two outputs, a token
    int lane, first_token, row;

    __device__ Target(int row, int part, int lane) : lane(lane), first_token(part * kPartTokens), row(row) {}

    __device__ __forceinline__ int token(int half) const { return first_token + 8 * half + lane / 4; }
    __device__ __forceinline__ bool exists(const Params& p, int half) const {
        return token(half) < p.num_tokens && row < p.num_rows;
    }
    // In out and residual, in elements.
    __device__ __forceinline__ int64_t index(const Params& p, int half) const {
        return (int64_t(token(half)) * p.num_rows + row) / rows_per_output(kForm) + lane % 4 * 2;
    }
    // The words in the places of those that are written: of token t two, then of token t + 8.
    __device__ __forceinline__ uint4 load_residual(const Params& p) const {
        uint2 of_token[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (kForm != Form::kLinearAdd || !exists(p, half)) continue;
            const auto* residual = static_cast<const __nv_bfloat16*>(p.residual) + index(p, half);
            const auto* from = reinterpret_cast<const uint32_t*>(residual);
            of_token[half] = {from[0], from[4]};
        }
        return {of_token[0].x, of_token[0].y, of_token[1].x, of_token[1].y};
    }

    // From what is written to what the lane holds sums of, or back: 8 tokens by 8 rows.
    __device__ __forceinline__ static uint32_t turn(uint32_t word) {
        return kTokensAreRows ? word : common::transpose_8x8(word);
    }
    // The words of 8 tokens from sums of theirs, of rows below 8 and from there on.
    __device__ __forceinline__ void finish(uint32_t (&words)[kWords], const Block& b, int half, float2 low, float2 high,
                                           uint2 residual) const {
        if constexpr (has_norm(kForm)) {
            const float* scales = b.own().scale;
            const float2 scale = kTokensAreRows
                                     ? float2{scales[token(half)], scales[token(half)]}
                                     : *reinterpret_cast<const float2*>(scales + first_token + 8 * half + lane % 4 * 2);
            low.x *= scale.x, low.y *= scale.y, high.x *= scale.x, high.y *= scale.y;
        }
        if constexpr (kForm == Form::kLinearAdd) {
            const float2 a = Pack::to_floats(turn(residual.x)), b = Pack::to_floats(turn(residual.y));
            low.x += a.x, low.y += a.y, high.x += b.x, high.y += b.y;
        }
        if constexpr (kForm == Form::kNormSwiGlu) {
            words[0] = turn(Pack::from_floats(silu(low.x) * high.x, silu(low.y) * high.y));
        } else {
            words[0] = turn(Pack::from_floats(low.x, low.y)), words[1] = turn(Pack::from_floats(high.x, high.y));
        }
    }
    // For the norm that follows: of what was written, a unit's rows of one token.
    __device__ __forceinline__ void sum_squares(const Params& p, const uint32_t (&words)[kWords], int half) const {
        float squares = 0;
#pragma unroll
        for (const uint32_t word : words) {
            const float2 v = Pack::to_floats(word);
            squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
        }
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        if (exists(p, half) && lane % 4 == 0) p.squares.sums[row / kUnitRows * p.num_tokens + token(half)] = squares;
    }
    // d: the lane's eight sums.
    __device__ __forceinline__ void write(const Params& p, const Block& b, const float* d, uint4 residual) const {
        constexpr int kLow = kTokensAreRows ? 2 : 4, kHigh = kTokensAreRows ? 4 : 2;  // a half and a high row further
        const uint2 added[] = {{residual.x, residual.y}, {residual.z, residual.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* of_half = d + kLow * half;
            uint32_t words[kWords];
            finish(words, b, half, {of_half[0], of_half[1]}, {of_half[kHigh], of_half[kHigh + 1]}, added[half]);
            if (exists(p, half)) {
                auto* to = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.out) + index(p, half));
#pragma unroll
                for (int i = 0; i < kWords; ++i) to[4 * i] = words[i];
            }
            if (kForm == Form::kLinearAdd && p.squares.sums) sum_squares(p, words, half);
        }
    }
};

// The warps of a block share the fragments that it finishes: each has one part, of every so many-th unit.
template <int kTokens, Form kForm>
struct Finisher {
    static constexpr int kParts = kTokens / kPartTokens, kApart = kConsumerWarps / kParts;
    using Target = batch_linear::Target<kForm, tokens_are_rows(kTokens)>;
    const Params& p;
    const Block& b;
    const Receiver<kTokens> own;
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % kParts, first = threadIdx.x / 32 / kParts;
    uint4 first_residual;  // asked for before the product

    __device__ Finisher(const Params& p, const Block& b) : p(p), b(b), own(p, b.rank) {}

    __device__ __forceinline__ bool has(int unit) const { return first < kApart && unit < own.units; }
    __device__ __forceinline__ Target target(int unit) const {
        return {b.first_row + (own.first + unit) * kUnitRows, part, lane};
    }

    __device__ __forceinline__ void begin() {
        if (kForm == Form::kLinearAdd && has(first)) first_residual = target(first).load_residual(p);
    }

    __device__ __forceinline__ void wait_for_scales() {
        if constexpr (has_norm(kForm)) common::named_sync(1, kConsumers + kScaleThreads);
    }

    // All there is to sum is in this block.
    template <typename Sums>
    __device__ __forceinline__ void finish_alone(const Sums& sums) {
        sums.each(p.units, [&](int unit, int part, const float* d) {
            const Target to(b.first_row + unit * kUnitRows, part, lane);
            to.write(p, b, d, to.load_residual(p));
        });
    }

    // Every warp's fragments to the block that finishes their unit.
    template <typename Sums>
    __device__ __forceinline__ void send_sums(const Sums& sums) {
        common::wait_for_cluster(b.drained());
        sums.each(p.units, [&](int unit, int part, const float* d) {
            const int owner = owner_of(unit, p.units, p.splits);
            const Receiver<kTokens> receiver(p, owner);
            const uint32_t to = common::in_block(b.base, owner), barrier = to + b.received() - b.base;
            const uint32_t place = to + receiver.place(p, b.rank, unit - receiver.first, part);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                common::send(place + (j * 32 + lane) * 16, barrier, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        });
    }

    __device__ __forceinline__ void finish(int unit, uint4 residual) const {
        float4 sum[2] = {};
#pragma unroll 4
        for (int source = 0; source < p.splits; ++source) {
            const float4* from = b.at<float4>(own.place(p, source, unit, part)) + lane;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float4 more = from[32 * j];
                sum[j].x += more.x, sum[j].y += more.y, sum[j].z += more.z, sum[j].w += more.w;
            }
        }
        const float d[] = {sum[0].x, sum[0].y, sum[0].z, sum[0].w, sum[1].x, sum[1].y, sum[1].z, sum[1].w};
        target(unit).write(p, b, d, residual);
    }

    __device__ __forceinline__ void finish_received() {
        common::wait_for_cluster(b.received());
        if (has(first)) finish(first, first_residual);
#pragma unroll 1
        for (int unit = first + kApart; has(unit); unit += kApart) finish(unit, target(unit).load_residual(p));
    }
};

}  // namespace batch_linear
