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
constexpr int kRowBytes = kPanelColumns * 2;

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

// A warp's accumulators over one tile, for kTokenTiles * 8 tokens.
template <class Grid, int kTokenTiles, bool kNorm>
struct Accumulator {
    float sums[Grid::kRowTiles][kTokenTiles][4];
    float squares[kNorm ? kTokenTiles : 1][4];  // tokens of a tile by the same tokens: what counts is on the diagonal

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : sums)
#pragma unroll
            for (auto& tile : row)
#pragma unroll
                for (float& sum : tile) sum = 0;
#pragma unroll
        for (auto& tile : squares)
#pragma unroll
            for (float& sum : tile) sum = 0;
    }

    // weight, x: this lane's addresses, of the first of the warp's rows and tokens.
    __device__ __forceinline__ void add(uint32_t weight, uint32_t x) {
        uint32_t rows[Grid::kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < Grid::kRowTiles; ++i)
#pragma unroll
            for (int step = 0; step < 2; ++step)
                common::ldmatrix_x4(rows[i][step], (weight ^ (step * 32)) + i * 16 * kRowBytes);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            uint32_t tokens[4];
            common::ldmatrix_x4(tokens, x + j * 8 * kRowBytes);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int i = 0; i < Grid::kRowTiles; ++i)
                    common::mma<bf16>(sums[i][j], rows[i][step], tokens[2 * step], tokens[2 * step + 1]);
                // The same registers hold eight tokens as columns of B, and as the upper rows of A.
                const uint32_t same[4] = {tokens[2 * step], 0, tokens[2 * step + 1], 0};
                if constexpr (kNorm) common::mma<bf16>(squares[j], same, tokens[2 * step], tokens[2 * step + 1]);
            }
        }
    }

    // Depends on all that was read: on one sum of every product.
    __device__ __forceinline__ float all_bits() const {
        uint32_t bits = 0;
#pragma unroll
        for (const auto& row : sums)
#pragma unroll
            for (const auto& tile : row) bits |= __float_as_uint(tile[0]);
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

    // To squares [token], likewise; the warps of one column hold the same.
    __device__ __forceinline__ void store_squares(float* to, int row_warp, int lane) const {
        const int token = lane / 4;
        if (row_warp > 0 || lane % 4 != token / 2) return;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) to[j * 8 + token] = token % 2 ? squares[j][1] : squares[j][0];
    }
};

}  // namespace skinny_linear
