// The inner loop: one warp's share of a stage, weights as the tensor cores' rows and tokens as their columns.
//
// A stage holds boxes of 64 columns, 128 bytes a row, whose 16-byte chunks are XORed with the row's number (the copy
// engine's 128-byte swizzle), so that the eight rows that ldmatrix reads at a time lie in different banks. A warp takes
// half a box, four chunks, which are two steps of the tensor cores.
#pragma once
#include "common/async.cuh"
#include "common/mma.cuh"
#include "skinny_linear/params.h"

namespace skinny_linear {

using bf16 = __nv_bfloat16;
constexpr int kRowBytes = kBox * 2;

// What ldmatrix wants of a lane. Of 16 rows of weight: chunks 0 and 1 of rows 0-7 and 8-15; the second step's chunks
// are at this offset ^ 32. Of 8 tokens: chunks 0 to 3. The other half of the box: ^ 64.
__device__ __forceinline__ uint32_t weight_offset(int lane) {
    const int row = lane % 16;
    return row * kRowBytes + ((lane / 16) ^ (row % 8)) * 16;
}
__device__ __forceinline__ uint32_t token_offset(int lane) {
    const int token = lane % 8;
    return token * kRowBytes + ((lane / 8) ^ token) * 16;
}

// Where the norm's weight for columns 2 word, 2 word + 1 lies in shared memory, in words: what a lane needs for its 32
// columns of a token, words q, q + 4, q + 8, q + 12 of 16, is contiguous.
__device__ __forceinline__ int norm_place(int word) {
    return word / 16 * 16 + word % 4 * 4 + word / 4 % 4;
}

// A warp's accumulators over one tile, for kTokenTiles * 8 tokens.
template <class Grid, int kTokenTiles, bool kNorm>
struct Accumulator {
    static constexpr int kOwnTiles = (kTokenTiles + Grid::kRowWarps - 1) / Grid::kRowWarps;  // whose squares it sums
    float sums[Grid::kRowTiles][kTokenTiles][4];
    float squares[kOwnTiles];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : sums)
#pragma unroll
            for (auto& tile : row)
#pragma unroll
                for (float& sum : tile) sum = 0;
#pragma unroll
        for (float& sum : squares) sum = 0;
    }

    // weight, x: this lane's addresses, of the first of the warp's rows and tokens; norm: of the factors for x.
    __device__ __forceinline__ void add(uint32_t weight, uint32_t x, uint32_t norm, int row_warp) {
        uint32_t rows[Grid::kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < Grid::kRowTiles; ++i)
#pragma unroll
            for (int step = 0; step < 2; ++step)
                common::ldmatrix_x4(rows[i][step], (weight ^ (step * 32)) + i * 16 * kRowBytes);
        uint32_t factors[4] = {};
        if (kNorm) common::load_shared(factors, norm);
        if constexpr (kNorm) {  // of tokens as they are; warps without a tile of their own repeat another's
#pragma unroll
            for (int j = 0; j < kOwnTiles; ++j) {
                uint32_t tokens[4];
                common::ldmatrix_x4(tokens, x + min(j * Grid::kRowWarps + row_warp, kTokenTiles - 1) * 8 * kRowBytes);
#pragma unroll
                for (const uint32_t pair : tokens) {
                    const float2 v = common::Pack<bf16>::to_floats(pair);
                    squares[j] = fmaf(v.x, v.x, squares[j]);
                    squares[j] = fmaf(v.y, v.y, squares[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            uint32_t tokens[4];
            common::ldmatrix_x4(tokens, x + j * 8 * kRowBytes);
            if constexpr (kNorm) {
                tokens[0] = common::multiply_pairs(tokens[0], factors[0]),
                tokens[1] = common::multiply_pairs(tokens[1], factors[1]);
                tokens[2] = common::multiply_pairs(tokens[2], factors[2]),
                tokens[3] = common::multiply_pairs(tokens[3], factors[3]);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int i = 0; i < Grid::kRowTiles; ++i)
                    common::mma<bf16>(sums[i][j], rows[i][step], tokens[2 * step], tokens[2 * step + 1]);
        }
    }

    // Depends on all that was read: on one sum of every product, and on the squares.
    __device__ __forceinline__ float all_bits() const {
        uint32_t bits = 0;
#pragma unroll
        for (const auto& row : sums)
#pragma unroll
            for (const auto& tile : row) bits |= __float_as_uint(tile[0]);
#pragma unroll
        for (const float square : squares) bits |= __float_as_uint(square);
        return __uint_as_float(bits);
    }

    // To partials [token][stride], of this warp's columns and from its first token on.
    __device__ __forceinline__ void store(float* partials, int stride, int tile_rows, int row_warp, int lane) const {
#pragma unroll
        for (int i = 0; i < Grid::kRowTiles; ++i) {
            const int first = (row_warp * Grid::kRowTiles + i) * 16;
            if (first >= tile_rows) break;
            float* at = partials + lane % 4 * 2 * stride + first + lane / 4;
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j, at += 8 * stride) {
                at[0] = sums[i][j][0], at[stride] = sums[i][j][1];
                at[8] = sums[i][j][2], at[stride + 8] = sums[i][j][3];
            }
        }
    }

    // To squares [token], likewise.
    __device__ __forceinline__ void store_squares(float* to, int row_warp, int lane) const {
#pragma unroll
        for (int j = 0; j < kOwnTiles; ++j) {
            float sum = squares[j];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int tile = j * Grid::kRowWarps + row_warp;
            if (tile < kTokenTiles && lane % 4 == 0) to[tile * 8 + lane / 4] = sum;
        }
    }
};

}  // namespace skinny_linear
