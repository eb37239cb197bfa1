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

// The row that holds a tile, the same for the whole warp; of its units the number of tiles and the inverse.
struct RowOfTile {
    int row, tokens, slot, tiles_before, count;
    float inverse_count;
};

// Loads where it stands. The compiler moves what need not be in order, as __ldg, behind the next barrier.
__device__ __forceinline__ int load_now(const int* from) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Each becomes the sum over this lane and the lower ones.
template <int kCount>
__device__ __forceinline__ void sum_over_lanes(int (&x)[kCount], int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int other = __shfl_up_sync(~0u, x[i], distance);
            x[i] += lane >= distance ? other : 0;
        }
    }
}

// The rows of the batch in shared memory: tokens, slots, and of more than 32 rows the number of tiles before each (all
// its kv heads). Rows of negative length count as empty.
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

    __device__ static int unit_tiles(int length) { return max(ceil_div(length, kBlockSize), 0); }

    // One warp reads more than 32 rows and sums them up, 32 kAtOnce of them a trip to memory; returns the total.
    template <int kAtOnce, typename Meanwhile>
    __device__ __forceinline__ int fill(const Params& p, int lane, Meanwhile meanwhile) {
        int before = 0;
#pragma unroll 1
        for (int first = 0; first < batch; first += 32 * kAtOnce) {
            int length[kAtOnce], slot[kAtOnce], sum[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                slot[i] = min(first + 32 * i + lane, batch - 1);
                length[i] = load_now(p.lengths + slot[i]);
            }
            if (p.slots) {
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) slot[i] = load_now(p.slots + slot[i]);
            }
            if (first == 0) meanwhile();
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                sum[i] = first + 32 * i + lane < batch ? unit_tiles(length[i]) * num_kv_heads : 0;
            sum_over_lanes(sum, lane);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = first + 32 * i + lane;
                if (row < batch) {
                    tokens[row] = length[i];
                    slots[row] = slot[i];
                    tiles_before[row + 1] = before + sum[i];
                }
                before += __shfl_sync(~0u, sum[i], 31);
            }
        }
        if (lane == 0) tiles_before[0] = 0;
        __syncwarp();
        return before;
    }

    // It is the last row that begins at the tile or before it; empty ones that begin there come before.
    __device__ RowOfTile find(int tile, int lane) const {
        int row = -1;
#pragma unroll 4
        for (int first = 0; first < batch; first += 32)
            row += __popc(__ballot_sync(~0u, first + lane < batch && tiles_before[first + lane] <= tile));
        const int count = unit_tiles(tokens[row]);
        return {row, tokens[row], slots[row], tiles_before[row], count, inverse(static_cast<float>(count))};
    }
};

// Up to 32 rows, one a lane: the same without a detour through shared memory. The way to the first load is a chain of
// instructions that nothing overlaps, and each of them counts.
struct FewRows {
    int tokens, slot, tiles_before, count, total;
    float inverse_count;
    bool alone;

    template <typename Meanwhile>
    __device__ __forceinline__ FewRows(const Params& p, const Rows& rows, int lane, Meanwhile meanwhile)
        : alone(rows.batch == 1) {
        slot = min(lane, rows.batch - 1);
        tokens = load_now(p.lengths + slot);
        if (p.slots) slot = load_now(p.slots + slot);
        meanwhile();
        count = Rows::unit_tiles(tokens);
        inverse_count = inverse(static_cast<float>(count));
        tiles_before = 0;
        total = count * rows.num_kv_heads;
        if (alone) return;
        const int own = lane < rows.batch ? total : 0;
        int sum[1] = {own};
        sum_over_lanes(sum, lane);
        tiles_before = sum[0] - own;
        total = __shfl_sync(~0u, sum[0], 31);
    }
    // For others, and for later.
    __device__ __forceinline__ void store(const Rows& rows, int lane) const {
        if (lane >= rows.batch) return;
        rows.tokens[lane] = tokens;
        rows.slots[lane] = slot;
    }
    __device__ __forceinline__ RowOfTile find(int tile) const {
        if (alone) return {0, tokens, slot, 0, count, inverse_count};
        const int row = __popc(__ballot_sync(~0u, tiles_before <= tile)) - 1;
        const auto of_row = [&](auto x) { return __shfl_sync(~0u, x, row); };
        return {row, of_row(tokens), of_row(slot), of_row(tiles_before), of_row(count), of_row(inverse_count)};
    }
};

// A place in the list of tiles: tile `index` of the `count` of a unit.
struct Walk {
    int row, head, index, count;
    int tokens, slot;  // of the row

    __device__ static Walk at(const RowOfTile& found, int tile) {
        const Quotient place = Quotient::of(tile - found.tiles_before, found.count, found.inverse_count);
        return {found.row, place.quotient, place.remainder, found.count, found.tokens, found.slot};
    }

    // The cache block of tile `tile` of the unit.
    __device__ __forceinline__ int block(const Params& p, int tile) const {
        return p.block_table ? __ldg(p.block_table + row * p.stride_table_row + tile) : slot * p.blocks_per_slot + tile;
    }

    // That of tile `index + done + lane`, for 32 of the next `count` tiles; lanes beyond them get the last one's.
    __device__ __forceinline__ int block_of_lane(const Params& p, int done, int count, int lane) const {
        return block(p, index + min(done + lane, count - 1));
    }

    // To the first tile of the next unit; there must be one.
    __device__ void next_unit(const Rows& rows) {
        index = 0;
        if (++head < rows.num_kv_heads) return;
        head = 0;
        do tokens = rows.tokens[++row];
        while (tokens <= 0);
        slot = rows.slots[row];
        count = ceil_div(tokens, kBlockSize);
    }
};

// The first 32 entries of one row of the block table, one a lane, asked for while the lengths are on their way: of the
// row in which the range begins if all rows are equally long. Of contexts up to 2048 tokens the first tile then does
// not wait for a trip to memory behind the lengths.
struct TableGuess {
    int row = -1, entry = 0;

    __device__ __forceinline__ void ask(const Params& p, int range, float inverse_blocks, int lane) {
        if (!p.block_table) return;
        row = static_cast<int>((range + 0.5f) * inverse_blocks * p.batch);
        entry = load_now(p.block_table + row * p.stride_table_row + min(lane, p.blocks_per_slot - 1));
    }
    // As Walk::block_of_lane from the walk's tile on.
    __device__ __forceinline__ int block_of_lane(const Params& p, const Walk& walk, int count, int lane) const {
        if (row != walk.row || walk.index + min(count, 32) > 32) return walk.block_of_lane(p, 0, count, lane);
        return __shfl_sync(~0u, entry, walk.index + min(lane, count - 1));
    }
};

// What the block does, as its loading warp finds out.
struct Share {
    Split split;
    Walk walk;         // at the first tile
    int begin, tiles;  // in the list of all tiles

    // Leaves the rows in shared memory. Calls meanwhile() when lengths are on their way, and at_once(share) when both
    // are there: of few rows that is near in the code, what the caller does afterwards is not.
    template <typename Meanwhile, typename AtOnce>
    __device__ static __forceinline__ Share find(const Params& p, Rows& rows, int range, float inverse_blocks, int lane,
                                                 Meanwhile meanwhile, AtOnce at_once) {
        Share share{};
        if (rows.batch > 32) {
            const int total = rows.batch <= 64 ? rows.fill<2>(p, lane, meanwhile) : rows.fill<8>(p, lane, meanwhile);
            if (share.cut(p, total, range, inverse_blocks))
                share.walk = Walk::at(rows.find(share.begin, lane), share.begin);
            at_once(share);
        } else {
            const FewRows few(p, rows, lane, meanwhile);
            few.store(rows, lane);
            if (share.cut(p, few.total, range, inverse_blocks))
                share.walk = Walk::at(few.find(share.begin), share.begin);
            at_once(share);
        }
        return share;
    }

    // Whether there are tiles for the block.
    __device__ __forceinline__ bool cut(const Params& p, int total, int range, float inverse_blocks) {
        split = Split::of(total, gridDim.x, inverse_blocks, p.min_tiles);
        begin = split.begin(range);
        tiles = split.begin(range + 1) - begin;
        return tiles > 0;
    }
};

}  // namespace decode_attn
