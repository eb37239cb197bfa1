// Which tiles a cluster works on, and in what order.
//
// Its first tile goes by its own number. Of few tiles it then takes every so many-th. Of many each later one is
// claimed, by one thread, shortly before all of the tile before has been asked for: else clusters that are a little
// slower would fall behind by several tiles, and read operands once more that all others have left long since. The
// claim is sent to both blocks of the cluster, whose warps read it when they get to it.
#pragma once
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "gemm/params.h"

namespace gemm {

constexpr int kGroupTokens = 2048;            // that meet a tile of weights one after the other
constexpr int kClaimStep = 8, kSendStep = 4;  // before a tile's last step: the answer takes a microsecond, a step 0.35

// Of all clusters, in kernels of this translation unit: they run one after the other. Back at 0 after each.
static __device__ unsigned num_claimed;

// A part of a tile, which is all of it if the inner dimension is not split.
struct Tile {
    int token, row;          // in tiles of a cluster
    int part, first, steps;  // along the inner dimension
};

// Down a group of tiles of tokens first, then on along the weight rows: neighbours in time share operands in L2.
template <typename Shape>
__device__ __forceinline__ Tile tile_at(const Tiling& t, int index) {
    constexpr int kSplits = Shape::kSplits, kGroupTiles = kGroupTokens / (kCluster * Shape::kTokens);
    const int group_tiles = kGroupTiles * t.tiles_rows, tile = index / kSplits, part = index % kSplits;
    const int group = tile / group_tiles * kGroupTiles;
    const int height = min(kGroupTiles, t.tiles_tokens - group), in_group = tile % group_tiles;
    const int first = t.steps * part / kSplits;
    return {group + in_group % height, in_group / height, part, first, t.steps * (part + 1) / kSplits - first};
}

// Position in a ring of kSize slots.
template <int kSize>
struct Cursor {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == kSize) slot = 0, parity ^= 1;
    }
};

// Where claims arrive: their barriers, then their numbers. A warp may be two tiles behind the one that loads.
struct Claims {
    uint32_t barriers, numbers;  // addresses
    __device__ __forceinline__ uint32_t barrier(int slot) const { return barriers + 8 * slot; }
    __device__ __forceinline__ uint32_t number(int slot) const { return numbers + 4 * slot; }
};

// The tiles of one cluster, for one warp.
struct TileWalk {
    const Tiling& t;
    Claims claims;
    int index = blockIdx.x / kCluster;
    Cursor<kClaimSlots> at{};

    __device__ __forceinline__ bool done() const { return index >= t.parts; }

    // `announces`: true in one thread of each block.
    __device__ __forceinline__ void advance(bool announces = false) {
        if (!t.claimed) {
            index += gridDim.x / kCluster;
            return;
        }
        if (announces) common::mbarrier_expect(claims.barrier(at.slot), 4);
        common::wait_for_cluster(claims.barrier(at.slot), at.parity);
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(index) : "r"(claims.number(at.slot)) : "memory");
        at.advance();
    }
};

// The number of this claim. It is looked at a few steps later, when the answer is here.
__device__ __forceinline__ unsigned claim_tile() {
    return atomicAdd(&num_claimed, 1u);
}

// The tile that a claim stands for, to where `walk` will look for its next, in both blocks. There are as many claims as
// tiles, of which the last ones find none: the very last makes way for the next kernel.
__device__ __forceinline__ void send_claim(const TileWalk& walk, unsigned claim) {
    if (claim == walk.t.parts - 1) num_claimed = 0;
    const int slot = walk.at.slot, index = gridDim.x / kCluster + claim;
    for (int rank = 0; rank < kCluster; ++rank)
        common::send(common::in_block(walk.claims.number(slot), rank),
                     common::in_block(walk.claims.barrier(slot), rank), __int_as_float(index));
}

}  // namespace gemm
