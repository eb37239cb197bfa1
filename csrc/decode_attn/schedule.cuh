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
    static constexpr int kRowsAtOnce = 4;

    __device__ Rows(int* memory, const Params& p)
        : tokens(memory),
          slots(memory + p.batch),
          tiles_before(memory + 2 * p.batch),
          batch(p.batch),
          num_kv_heads(p.num_kv_heads) {}

    __device__ int tiles(int row) const { return ceil_div(tokens[row], kBlockSize); }
    __device__ int total() const { return tiles_before[batch]; }

    // One warp reads the lengths and sums them up. Rows of negative length count as empty here.
    __device__ void fill(const Params& p, int lane) {
        const int per_lane = (batch + 31) / 32, first = lane * per_lane, last = min(first + per_lane, batch);
        int sum = 0;
#pragma unroll 1
        for (int start = first; start < last; start += kRowsAtOnce) {
            int length[kRowsAtOnce], slot[kRowsAtOnce];
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i) {
                const int row = min(start + i, last - 1);
                length[i] = __ldg(p.lengths + row);
                slot[i] = p.slots ? __ldg(p.slots + row) : row;
            }
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i) {
                if (start + i >= last) break;
                tokens[start + i] = length[i];
                slots[start + i] = slot[i];
                tiles_before[start + i] = sum;
                sum += max(ceil_div(length[i], kBlockSize), 0) * num_kv_heads;
            }
        }
        int before = sum;  // becomes the sum over the lower lanes
        if (batch > 1) {
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(~0u, before, distance);
                before += lane >= distance ? other : 0;
            }
        }
        const int total = __shfl_sync(~0u, before, (batch - 1) / per_lane);  // of the lane that holds the last row
        before -= sum;
#pragma unroll 1
        for (int row = first; row < last && before > 0; ++row) tiles_before[row] += before;
        if (lane == 0) tiles_before[batch] = total;
        __syncwarp();
    }

    struct Tile {
        int row, head, index, count;  // tile `index` of the row's `count`
    };

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

    // `row` is the tile's row or an earlier one.
    __device__ Tile locate(int tile, int row) const {
        if (tiles_before[row + 1] <= tile) {
            int high = batch - 1;  // search the last row with tiles_before <= tile
            ++row;
#pragma unroll 1
            while (row < high) {
                const int middle = (row + high + 1) / 2;
                if (tiles_before[middle] <= tile)
                    row = middle;
                else
                    high = middle - 1;
            }
        }
        const int count = tiles(row);
        const Quotient place = Quotient::of(tile - tiles_before[row], count);
        return {row, place.quotient, place.remainder, count};
    }
};

}  // namespace decode_attn
