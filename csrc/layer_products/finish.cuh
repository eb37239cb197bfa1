// From the tensor cores' sums to the output: over the blocks that share a tile, then the form's epilogue. Every sum is
// taken in a fixed order, so that a repeat is bitwise equal.
//
// A warp holds 16 rows of weight, a unit, for all tokens, in fragments of 16 rows by 8 tokens
// (common/wgmma_shapes.cuh): a lane has rows r and r + 8 of tokens t and t + 1, r = lane / 4, t = 2 (lane % 4). Blocks
// exchange sums through L2: one writes its pieces' units with a flag each; when its range is done, it reads the units
// that it finishes.
#pragma once
#include "common/async.cuh"
#include "common/grid_words.cuh"
#include "common/mma.cuh"
#include "layer_products/params.h"

namespace layer_products {

using Pack = common::Pack<__nv_bfloat16>;

// Where a lane's part of a fragment goes: two neighbouring outputs of token lane / 4, for all but SwiGLU also those 8
// rows on. SwiGLU makes one output of rows r and r + 8.
struct Target {
    int64_t index;  // in out, residual and normed, in elements
    int row;        // of `norm`
    bool exists;

    __device__ Target(const Params& p, const Product& q, int tile, int unit, int pair, int lane) {
        const int token = pair * 8 + lane / 4, first = tile * kTileRows + unit * kUnitRows;
        exists = token < p.num_tokens && first < q.num_rows;
        row = first + lane % 4 * 2;
        index = q.form == Form::kNormSwiGlu ? (int64_t(token) * q.num_rows + first) / 2 + lane % 4 * 2
                                            : int64_t(token) * q.num_rows + row;
    }
};

// What a fragment of linear_add needs beside the sums. Another block may have written the residual.
struct Operands {
    uint2 residual, norm;

    __device__ __forceinline__ static Operands load(const Product& q, const Target& to) {
        if (q.form != Form::kLinearAdd || !to.exists) return {};
        const auto* residual =
            reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(q.residual) + to.index);
        const auto* norm = reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(q.norm) + to.row);
        return {{__ldcg(residual), __ldcg(residual + 4)}, q.norm ? uint2{__ldg(norm), __ldg(norm + 4)} : uint2{}};
    }
};

// The tokens' scales for the products that follow a norm, one number a token: 1 / rms of what the tokens were before
// it. The warps beside those that multiply find them.
template <int kTokens>
struct Scales {
    static constexpr int kQuads = kTokens / 4, kParts = kScaleThreads / kQuads;

    __device__ static void find(const Params& p, const Product& q, Tail& tail, int thread) {
        const int quad = thread % kQuads, part = thread / kQuads, units = q.size / kUnitRows;
        float4 sum{};
#pragma unroll 16
        for (int unit = part; unit < units; unit += kParts) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(q.squares) + unit * kQuads + quad);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        reinterpret_cast<float4*>(tail.squares)[thread] = sum;
        common::named_sync(kScaleBarrier, kScaleThreads);
        for (int token = thread; token < kTokens; token += kScaleThreads) {
            float total = 0;
#pragma unroll
            for (int i = 0; i < kParts; ++i) total += tail.squares[i * kTokens + token];
            tail.scale[token] = rsqrtf(total / q.size + p.eps);
        }
    }
};

// What one block does with the sums of one product.
template <int kTokens>
struct Finisher {
    static constexpr int kPairs = kTokens / 8;
    const Params& p;
    const Product& q;
    const Tail& tail;
    int block;

    // One fragment of the output.
    __device__ __forceinline__ void write(const Target& to, float4 v, const Operands& o, int tile, int unit, int pair,
                                          int lane) const {
        auto* out = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(q.out) + to.index);
        if (q.form == Form::kLinearAdd) {
            // Residuals come as rows of a token and leave as that; the sums are columns in between.
            const float2 low = Pack::to_floats(common::transpose_8x8(o.residual.x));
            const float2 high = Pack::to_floats(common::transpose_8x8(o.residual.y));
            const uint32_t words[2] = {Pack::from_floats(v.x + low.x, v.y + low.y),
                                       Pack::from_floats(v.z + high.x, v.w + high.y)};
            const uint32_t rows[2] = {common::transpose_8x8(words[0]), common::transpose_8x8(words[1])};
            if (to.exists) out[0] = rows[0], out[4] = rows[1];
            if (!q.norm) return;
            const float2 a = Pack::to_floats(words[0]), b = Pack::to_floats(words[1]);
            float2 squares{fmaf(a.x, a.x, b.x * b.x), fmaf(a.y, a.y, b.y * b.y)};
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                squares.x += __shfl_xor_sync(~0u, squares.x, distance);
                squares.y += __shfl_xor_sync(~0u, squares.y, distance);
            }
            const int row = tile * kUnits + unit;
            if (lane < 4 && row * kUnitRows < q.num_rows)
                reinterpret_cast<float2*>(q.squares + row * kTokens + pair * 8)[lane] = squares;
            if (to.exists) {
                auto* normed = reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(q.normed) + to.index);
                normed[0] = common::multiply_pairs(rows[0], o.norm.x);
                normed[4] = common::multiply_pairs(rows[1], o.norm.y);
            }
            return;
        }
        const float2 scale = *reinterpret_cast<const float2*>(&tail.scale[pair * 8 + lane % 4 * 2]);
        v.x *= scale.x, v.y *= scale.y, v.z *= scale.x, v.w *= scale.y;
        if (q.form == Form::kNormSwiGlu) {
            const float x = __fdividef(v.x, 1 + __expf(-v.x)) * v.z, y = __fdividef(v.y, 1 + __expf(-v.y)) * v.w;
            const uint32_t word = common::transpose_8x8(Pack::from_floats(x, y));
            if (to.exists) out[0] = word;
        } else {
            const uint32_t low = common::transpose_8x8(Pack::from_floats(v.x, v.y));
            const uint32_t high = common::transpose_8x8(Pack::from_floats(v.z, v.w));
            if (to.exists) out[0] = low, out[4] = high;
        }
    }

    // The block has all of a tile.
    __device__ __forceinline__ void finish_whole(const float (&d)[kTokens / 2], int tile, int warp, int lane) const {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            const Target to(p, q, tile, warp, j, lane);
            write(to, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}, Operands::load(q, to), tile, warp, j, lane);
        }
    }

    __device__ __forceinline__ float4* place(int block, int slot, int unit, int lane) const {
        return p.sums + ((block * 2 + slot) * kUnits + unit) * unit_floats4(kTokens) + lane;
    }

    // For the others, and for this block itself. Slot 0 is the range's first piece.
    __device__ __forceinline__ void publish(const float (&d)[kTokens / 2], int slot, int warp, int lane) const {
        float4* to = place(block, slot, warp, lane);
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
            common::store_relaxed(to + j * 32, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }

    // Whether a tile is shared by two blocks that both begin with it: then each may wait for the other before its end.
    __device__ __forceinline__ bool both_begin_with(int tile) const {
        const Sharers sharers = Sharers::of(tile, q.steps, q.tiles * q.steps, q.blocks);
        return sharers.count == 2 && sharers.first % 2 == 1;
    }

    __device__ __forceinline__ void prefetch(int tile, int warp, int lane) const {
        if (q.form != Form::kLinearAdd) return;
        const Sharers sharers = Sharers::of(tile, q.steps, q.tiles * q.steps, q.blocks);
        const int first = sharers.first_unit(block - sharers.first),
                  end = sharers.first_unit(block - sharers.first + 1);
        for (int item = warp; item < (end - first) * kPairs; item += kConsumerWarps) {
            const Target to(p, q, tile, first + item / kPairs, item % kPairs, lane);
            if (to.exists) common::prefetch_l2(static_cast<const __nv_bfloat16*>(q.residual) + to.index);
        }
    }

    // Finishes this block's units of a tile that is cut. Of the blocks that share it, only the first can have begun
    // before the tile, and then the tile is its second piece.
    __device__ __forceinline__ void collect(int tile, int warp, int lane) const {
        constexpr int kItems = kTokens > 64 ? 1 : 2,
                      kSources = 4;  // fragments and blocks whose sums are asked for at once
        const int total = q.tiles * q.steps;
        const Sharers sharers = Sharers::of(tile, q.steps, total, q.blocks);
        const int rank = block - sharers.first, first = sharers.first_unit(rank);
        const int items = (sharers.first_unit(rank + 1) - first) * kPairs;
        const int first_slot = Range::of(total, sharers.first, q.blocks).begin < tile * q.steps;
#pragma unroll 1
        for (int begin = warp; begin < items; begin += kItems * kConsumerWarps) {
            const auto item = [&](int i) { return min(begin + i * kConsumerWarps, items - 1); };
            const auto unit = [&](int i) { return first + item(i) / kPairs; };
            const auto target = [&](int i) { return Target(p, q, tile, unit(i), item(i) % kPairs, lane); };
            Operands operands[kItems];
            float4 sum[kItems]{};
#pragma unroll
            for (int i = 0; i < kItems; ++i) operands[i] = Operands::load(q, target(i));
#pragma unroll 1
            for (int from = 0; from < sharers.count; from += kSources) {
                float4 v[kItems][kSources];
                const auto address = [&](int i, int k) {
                    const int source = min(from + k, sharers.count - 1);
                    return place(sharers.first + source, source == 0 ? first_slot : 0, unit(i), lane) +
                           item(i) % kPairs * 32;
                };
#pragma unroll
                for (int k = 0; k < kSources; ++k)
#pragma unroll
                    for (int i = 0; i < kItems; ++i) v[i][k] = common::load_relaxed(address(i, k));
#pragma unroll
                for (int k = 0; k < kSources; ++k) {
                    if (from + k >= sharers.count) break;
#pragma unroll
                    for (int i = 0; i < kItems; ++i) {
                        if (begin + i * kConsumerWarps >= items) break;
                        for (uint32_t spins = 0; common::is_empty(v[i][k]);
                             v[i][k] = common::load_relaxed(address(i, k)))
                            if (++spins == common::kMostSpins) __trap();
                        common::store_relaxed(address(i, k), common::empty());
                        sum[i].x += v[i][k].x, sum[i].y += v[i][k].y, sum[i].z += v[i][k].z, sum[i].w += v[i][k].w;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kItems; ++i)
                if (begin + i * kConsumerWarps < items)
                    write(target(i), sum[i], operands[i], tile, unit(i), item(i) % kPairs, lane);
        }
    }
};

}  // namespace layer_products
