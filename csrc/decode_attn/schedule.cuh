// Who does what, computed on the device from the lengths alone.
//
// The work is the list of all tiles, ordered by (row, kv head, tile). A *unit* is one (row, kv head). The list is cut into
// `ranges` runs of nearly equal size, one a block, whatever units they cross; the part of a unit inside one range is a
// *piece*. The block that holds a unit's first tile finishes the unit: it comes to that piece last in its own range, when
// the blocks with the higher ranges have long done theirs.
#pragma once
#include "decode_attn/params.h"

namespace decode_attn {

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Split {
    int ranges, base, extra;  // the first `extra` ranges have base + 1 tiles, the others base

    __device__ static Split of(int tiles, int blocks, int min_tiles) {
        const int largest = max(ceil_div(tiles, blocks), min_tiles);
        const int ranges = max(ceil_div(tiles, largest), 1);
        return {ranges, tiles / ranges, tiles % ranges};
    }
    __device__ int begin(int range) const { return range >= ranges ? ranges * base + extra : range * base + min(range, extra); }
    __device__ int range_of(int tile) const {
        const int border = extra * (base + 1);
        return tile < border ? tile / (base + 1) : extra + (tile - border) / base;
    }
};

// The rows of the batch in shared memory: tokens, slots, and the number of tiles before each row (all its kv heads).
struct Rows {
    int* tokens;       // [batch]
    int* slots;        // [batch]
    int* tiles_before; // [batch + 1]
    int batch, num_kv_heads;

    __device__ Rows(int* memory, const Params& p)
        : tokens(memory), slots(memory + p.batch), tiles_before(memory + 2 * p.batch), batch(p.batch), num_kv_heads(p.num_kv_heads) {}

    __device__ int tiles(int row) const { return ceil_div(tokens[row], kBlockSize); }
    __device__ int total() const { return tiles_before[batch]; }

    // One warp reads the lengths and sums them up. Rows of negative length count as empty here.
    __device__ void fill(const Params& p, int lane) {
        const int per_lane = ceil_div(batch, 32), first = lane * per_lane, last = min(first + per_lane, batch);
        int sum = 0;
        for (int row = first; row < last; ++row) {
            tokens[row] = __ldg(p.lengths + row);
            slots[row] = p.slots ? __ldg(p.slots + row) : row;
            tiles_before[row] = sum;
            sum += max(tiles(row), 0) * num_kv_heads;
        }
        int before = sum;  // becomes the sum over the lower lanes
        if (batch > 1) {
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(~0u, before, distance);
                before += lane >= distance ? other : 0;
            }
        }
        before -= sum;
        for (int row = first; row < last; ++row) tiles_before[row] += before;
        if (last == batch && first < batch) tiles_before[batch] = before + sum;
        __syncwarp();
    }

    struct Tile {
        int row, head, index, count;  // tile `index` of the row's `count`
    };

    __device__ Tile locate(int tile) const {
        int low = 0, high = batch - 1;  // the last row with tiles_before <= tile: it is not empty
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (tiles_before[middle] <= tile) low = middle;
            else high = middle - 1;
        }
        const int count = tiles(low), inside = tile - tiles_before[low];
        return {low, inside / count, inside % count, count};
    }
};

}  // namespace decode_attn
