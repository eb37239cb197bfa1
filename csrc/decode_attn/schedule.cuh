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

// Not to be put off by the compiler until the value is needed: several loads shall be on their way together.
__device__ __forceinline__ int load_once(const int* address) {
    int x;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(address));
    return x;
}

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
    __device__ int total() const { return tiles_before[batch]; }

    // One warp reads the lengths and sums them up; returns the total. Rows of negative length count as empty here.
    __device__ int fill(const Params& p, int lane) {
        constexpr int kAtOnce = 4;  // 32 rows each: what is on its way at a time
        int before = 0;
#pragma unroll 1
        for (int first = 0; first < batch; first += 32 * kAtOnce) {
            int length[kAtOnce], slot[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + 32 * i + lane;
                length[i] = row < batch ? load_once(p.lengths + row) : 0;
                slot[i] = row < batch && p.slots ? load_once(p.slots + row) : row;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + 32 * i + lane;
                if (first + 32 * i >= batch) break;
                const int own = max(ceil_div(length[i], kBlockSize), 0) * num_kv_heads;
                int sum = own;  // becomes the sum over this lane and the lower ones
                if (batch > 1) {
#pragma unroll
                    for (int distance = 1; distance < 32; distance *= 2) {
                        const int other = __shfl_up_sync(~0u, sum, distance);
                        sum += lane >= distance ? other : 0;
                    }
                }
                if (row < batch) {
                    tokens[row] = length[i];
                    slots[row] = slot[i];
                    tiles_before[row] = before + sum - own;
                }
                before += __shfl_sync(~0u, sum, min(31, batch - 1 - first - 32 * i));
            }
        }
        if (lane == 0) tiles_before[batch] = before;
        __syncwarp();
        return before;
    }

    // The row of a tile, the same for the whole warp: how many rows begin at or before it. Empty rows do not count: the
    // last row that begins at the tile is the one that has it.
    __device__ int row_of(int tile, int lane) const {
        if (batch == 1) return 0;
        int rows_before = 0;
#pragma unroll 1
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

}  // namespace decode_attn
