// Who does what, computed on the device from the lengths alone: the rows of the batch as a list of tiles.
//
// The work is the list of all tiles, ordered by (row, kv head, tile). A *unit* is one (row, kv head). The list is cut
// into *ranges* of equal size, one a block, whatever units they cross; the part of a unit inside one range is a
// *piece*. The block that holds a unit's first tile finishes the unit: it comes to that piece last in its own range,
// when the blocks with the higher ranges have long done theirs.
#pragma once
#include "decode_attn/params.h"
#include "decode_attn/split.h"

namespace decode_attn {

// The rows of the batch in shared memory: tokens, slots, and the number of tiles before each row (all its kv heads).
struct Rows {
    int* tokens;        // [batch]
    int* slots;         // [batch]
    int* tiles_before;  // [batch + 1]
    int batch, num_kv_heads;

    __device__ Rows(int* memory, const Params& p)
        : tokens(memory),
          slots(memory + p.batch),
          tiles_before(memory + 2 * p.batch),
          batch(p.batch),
          num_kv_heads(p.num_kv_heads) {}

    __device__ int tiles(int row) const { return ceil_div(tokens[row], kBlockSize); }

    // One warp reads the lengths and sums them up; returns the total. Rows of negative length count as empty here.
    __device__ __forceinline__ int fill(const Params& p, int lane) {
        return batch <= 32 ? fill_by<1>(p, lane) : batch <= 64 ? fill_by<2>(p, lane) : fill_by<8>(p, lane);
    }

    // Takes 32 kAtOnce rows a trip to memory.
    template <int kAtOnce>
    __device__ __forceinline__ int fill_by(const Params& p, int lane) {
        int before = 0;
#pragma unroll 1
        for (int first = 0; first < batch; first += 32 * kAtOnce) {
            int length[kAtOnce], slot[kAtOnce], sum[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                slot[i] = min(first + 32 * i + lane, batch - 1);
                length[i] = __ldg(p.lengths + slot[i]);
            }
            if (p.slots) {
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) slot[i] = __ldg(p.slots + slot[i]);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int tiles = max(ceil_div(length[i], kBlockSize), 0) * num_kv_heads;
                sum[i] =
                    first + 32 * i + lane < batch ? tiles : 0;  // becomes the sum over this lane and the lower ones
            }
            if (batch > 1) {
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
                    for (int i = 0; i < kAtOnce; ++i) {
                        const int other = __shfl_up_sync(~0u, sum[i], distance);
                        sum[i] += lane >= distance ? other : 0;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + 32 * i + lane;
                if (row < batch) {
                    tokens[row] = length[i];
                    slots[row] = slot[i];
                    tiles_before[row + 1] = before + sum[i];
                }
                before += __shfl_sync(~0u, sum[i], batch > 1 ? 31 : 0);
            }
        }
        if (lane == 0) tiles_before[0] = 0;
        __syncwarp();
        return before;
    }

    // The row of a tile, the same for the whole warp: how many rows begin at or before it. Empty rows do not count: the
    // last row that begins at the tile is the one that has it.
    __device__ int row_of(int tile, int lane) const {
        if (batch == 1) return 0;
        int rows_before = 0;
#pragma unroll 4
        for (int first = 0; first < batch; first += 32) {
            rows_before += __popc(__ballot_sync(~0u, first + lane < batch && tiles_before[first + lane] <= tile));
        }
        return rows_before - 1;
    }
};

// A place in the list of tiles: tile `index` of the `count` of a unit.
struct Walk {
    int row, head, index, count;

    __device__ static Walk at(const Rows& rows, int tile, int lane) {
        const int row = rows.row_of(tile, lane), count = rows.tiles(row);
        const Quotient place = Quotient::of(tile - rows.tiles_before[row], count);
        return {row, place.quotient, place.remainder, count};
    }

    // To the first tile of the next unit; there must be one.
    __device__ void next_unit(const Rows& rows) {
        index = 0;
        if (++head < rows.num_kv_heads) return;
        head = 0;
        do count = rows.tiles(++row);
        while (count <= 0);
    }
};

// What the block does, as its loading warp has found out.
struct Share {
    Split split;
    Walk walk;         // at the first tile
    int begin, tiles;  // in the list of all tiles

    __device__ static Share of(const Params& p, const Rows& rows, int total, int range, float inverse_blocks,
                               int lane) {
        Share share{Split::of(total, gridDim.x, inverse_blocks, p.min_tiles)};
        share.begin = share.split.begin(range);
        share.tiles = share.split.begin(range + 1) - share.begin;
        if (share.tiles > 0) share.walk = Walk::at(rows, share.begin, lane);
        return share;
    }
};

}  // namespace decode_attn
