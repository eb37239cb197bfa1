// out [T, N] = x [T, K] weight [N, K]^T for many tokens, on Hopper's wgmma.
//
// Grid: as many clusters of kCluster blocks as the GPU holds, each of which works through tiles of the output (which
// ones: tiles.cuh). A tile is Shape::kTokens tokens by Shape::kRows weight rows a block, and the blocks of a cluster
// take neighbouring rows of tiles, so that each brings only its part of the weights from L2 and multicasts it. Block:
// two warpgroups that multiply, half of the tokens by all the tile's rows each, and one whose warps only move data:
//   load     x and weight, 64 columns of the inner dimension a stage, into a ring    runs ahead into the next tile
//   math     ring -> accumulators -> staging buffers
//   store    staging buffers -> out; brings the residual into a buffer before math fills it
// Some tiles are staged in the ring: behind the last step load gives math one stage more, with the residual in it, and
// store empties that.
//
// Where tiles are fewer than clusters, the inner dimension of each is shared out among kSplits clusters, which exchange
// sums before the epilogue (exchange.cuh). Then every cluster has one part of one tile.
#pragma once
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "gemm/copy.cuh"
#include "gemm/exchange.cuh"
#include "gemm/params.h"
#include "gemm/tiles.cuh"

namespace gemm {

using common::operand, common::wgmma, common::wgmma_commit, common::wgmma_fence, common::wgmma_wait;

constexpr int kMathRegisters = 232, kMoveRegisters = 40;
static_assert(kMathRegisters * 256 + kMoveRegisters * 128 <= 65536 / kThreads / 8 * 8 * kThreads);

template <typename Shape>
struct Shared {
    uint32_t ring, buffers;  // addresses
    uint32_t full, empty;    // of the ring's stages
    uint32_t ready, staged;  // of the staging buffers, or of all in a stage: may be filled, are filled
    Claims claims;
    __device__ __forceinline__ static Shared at(uint32_t base) {
        constexpr int kOfRing = 8 * Shape::kStages, kOfBuffers = 8 * kMathGroups * Shape::kBuffers;
        const uint32_t barriers = base + Shape::kBytes;
        const uint32_t of_buffers = barriers + 2 * kOfRing, of_claims = of_buffers + 2 * kOfBuffers;
        return {base,
                base + Shape::kRingBytes,
                barriers,
                barriers + kOfRing,
                of_buffers,
                of_buffers + kOfBuffers,
                {of_claims, of_claims + 8 * kClaimSlots}};
    }
    // A buffer of a stage that serves for them.
    __device__ __forceinline__ uint32_t in_stage(int slot, int group, int box) const {
        return ring + slot * Shape::kStageBytes + (group * Shape::kBoxes + box) * kBufferBytes;
    }
};

// The first column of box `box` among those that a part finishes. Where boxes do not divide them, the last box starts
// in the one before, and writes some columns once more with the same values.
template <typename Shape>
__device__ __forceinline__ constexpr int box_column(int box) {
    const int column = box % Shape::kUnitBoxes * kBoxColumns, last = Shape::kColumns - kBoxColumns;
    return column < last ? column : last;
}

// Where the boxes of a warpgroup lie in out.
template <typename Shape>
__device__ __forceinline__ int out_column(const Tile& tile, int box) {
    return (tile.row * Shape::kSplits + tile.part) * Shape::kColumns + box_column<Shape>(box);
}
template <typename Shape>
__device__ __forceinline__ int out_token(const Tile& tile, int rank, int group, int box) {
    const int unit = group * Shape::kUnits + box / Shape::kUnitBoxes;
    return (tile.token * kCluster + rank) * Shape::kTokens + unit * kUnitTokens;
}

// Weights are constants: as many as the ring holds are asked for before the previous kernel has ended.
template <typename Shape>
__device__ void load_tiles(const TensorMaps& maps, const Tiling& t, const Shared<Shape>& s, int rank) {
    constexpr int kWeightBoxes = weight_boxes(Shape::kSplits);
    constexpr int kBoxBytes = Shape::kWeightBoxRows * kStageColumns * 2;
    const auto load_weight = [&](int slot, int step, const Tile& tile) {
        const uint32_t full = s.full + 8 * slot, weight = s.ring + slot * Shape::kStageBytes + Shape::kXBytes;
        common::mbarrier_expect(full, Shape::kStageBytes);
#pragma unroll
        for (int i = 0; i < kWeightBoxes; i += kCluster) {
            const int to = i + rank, from = (to + tile.part) % kWeightBoxes;  // first what this part finishes
            copy_box_to_blocks(weight + to * kBoxBytes, &maps.weight, full, (tile.first + step) * kStageColumns,
                               tile.row * Shape::kRows + from * Shape::kWeightBoxRows, (1 << kCluster) - 1);
        }
    };
    const auto load_x = [&](int slot, int step, const Tile& tile) {
        copy_box(s.ring + slot * Shape::kStageBytes, &maps.x, s.full + 8 * slot, (tile.first + step) * kStageColumns,
                 (tile.token * kCluster + rank) * Shape::kTokens);
    };
    const auto give_stage = [&](int slot, const Tile& tile) {
        const uint32_t full = s.full + 8 * slot;
        if constexpr (Shape::kEpilogue != Epilogue::kResidual) {
            common::mbarrier_arrive(full);
        } else {
            common::mbarrier_expect(full, Shape::kTileBytes);
#pragma unroll
            for (int i = 0; i < kMathGroups * Shape::kBoxes; ++i) {
                const int group = i / Shape::kBoxes, box = i % Shape::kBoxes;
                copy_box(s.in_stage(slot, group, box), &maps.residual, full, out_column<Shape>(tile, box),
                         out_token<Shape>(tile, rank, group, box));
            }
        }
    };
    TileWalk walk{t, s.claims};
    const Tile first = tile_at<Shape>(t, walk.index);
    const int ahead = min(Shape::kStages, first.steps);
    for (int step = 0; step < ahead; ++step) load_weight(step, step, first);
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    Cursor<Shape::kStages> at;
    for (int step = 0; step < ahead; ++step, at.advance()) load_x(step, step, first);
    static_assert(Shape::kStages <= kMinClaimedSteps - kClaimStep);
    const bool claims_tiles = t.claimed && rank == 0;
    int step = ahead;
    unsigned claim = 0;
    for (; !walk.done(); walk.advance(true)) {
        const Tile tile = tile_at<Shape>(t, walk.index);
        for (; step < tile.steps; ++step, at.advance()) {
            common::mbarrier_wait(s.empty + 8 * at.slot, at.parity ^ 1);
            load_weight(at.slot, step, tile);
            load_x(at.slot, step, tile);
            if (claims_tiles && step == tile.steps - kClaimStep) claim = claim_tile();
            if (claims_tiles && step == tile.steps - kSendStep) send_claim(walk, claim);
        }
        if constexpr (Shape::kInRing) {
            common::mbarrier_wait(s.empty + 8 * at.slot, at.parity ^ 1);
            give_stage(at.slot, tile);
            at.advance();
        }
        step = 0;
    }
}

// Where the boxes of one warpgroup's output lie, in order.
template <typename Shape>
struct BoxWalk {
    TileWalk tiles;
    int rank, group, box = 0;
    __device__ __forceinline__ Tile tile() const { return tile_at<Shape>(tiles.t, tiles.index); }
    __device__ __forceinline__ int token() const { return out_token<Shape>(tile(), rank, group, box); }
    __device__ __forceinline__ int column() const { return out_column<Shape>(tile(), box); }
    __device__ __forceinline__ bool done() const { return tiles.done(); }
    __device__ __forceinline__ void advance() {
        if (++box == Shape::kBoxes) box = 0, tiles.advance();
    }
};

template <typename Shape>
__device__ void store_tiles(const TensorMaps& maps, const Tiling& t, const Shared<Shape>& s, int rank, int group) {
    common::wait_for_previous_kernel();
    BoxWalk<Shape> out{{t, s.claims}, rank, group}, next{{t, s.claims}, rank, group};
    const int first = group * Shape::kBuffers;
    auto make_ready = [&](int slot) {
        if (next.done()) return;  // nothing will be staged there again, and no further tile comes
        const uint32_t ready = s.ready + 8 * (first + slot);
        if (Shape::kEpilogue == Epilogue::kResidual) {
            common::mbarrier_expect(ready, kBufferBytes);
            copy_box(s.buffers + (first + slot) * kBufferBytes, &maps.residual, ready, next.column(), next.token());
        } else {
            common::mbarrier_arrive(ready);
        }
        next.advance();
    };
    for (int slot = 0; slot < Shape::kBuffers; ++slot) make_ready(slot);
    Cursor<Shape::kBuffers> at;
    for (; !out.done(); out.advance(), at.advance()) {
        common::mbarrier_wait(s.staged + 8 * (first + at.slot), at.parity);
        store_box(&maps.out, s.buffers + (first + at.slot) * kBufferBytes, out.column(), out.token());
        wait_stores_read();
        make_ready(at.slot);
    }
    wait_stores();
}

// The same for stages that serve as buffers: the one behind each tile's last step, given back to both blocks' loads in
// the name of the warps that filled it. Tiles of few steps have several of them in the ring: math fills one at a time.
// Nothing but time says that the other block, too, has seen the stage's last step given back: the same instructions did
// it for both blocks, before all that happens here. The last tile's stage is not given back: nobody waits for it, and
// where a tile lies outside of out there is nothing to store, so the other block could have ended before it knew.
template <typename Shape>
__device__ void store_stages(const TensorMaps& maps, const Tiling& t, const Shared<Shape>& s, int rank, int group) {
    common::wait_for_previous_kernel();
    int slot = 0;
    Cursor<Shape::kBuffers> at;
    common::mbarrier_arrive(s.ready + 8 * group);
    for (TileWalk walk{t, s.claims}; !walk.done(); at.advance()) {
        const Tile tile = tile_at<Shape>(t, walk.index);
        slot = (slot + tile.steps) % Shape::kStages;
        common::mbarrier_wait(s.staged + 8 * group, at.parity);
#pragma unroll
        for (int box = 0; box < Shape::kBoxes; ++box)
            store_box(&maps.out, s.in_stage(slot, group, box), out_column<Shape>(tile, box),
                      out_token<Shape>(tile, rank, group, box));
        wait_stores_read();
        walk.advance();
        if (walk.done()) break;
        common::mbarrier_arrive(s.ready + 8 * group);
        for (int block = 0; block < kCluster; ++block)
            common::arrive_remote(common::in_block(s.empty + 8 * slot, block), kMathWarps / kMathGroups);
        slot = (slot + 1) % Shape::kStages;
    }
    wait_stores();
}

__device__ __forceinline__ float silu(float x) {
    return __fdividef(x, 1 + __expf(-x));
}

// Two columns of out from two columns of the accumulators, which are those of `low` and `low + 1`.
template <typename T, typename Shape>
__device__ __forceinline__ uint32_t finish(const float (&d)[Shape::kFragment], int low, uint32_t residual) {
    if constexpr (Shape::kEpilogue == Epilogue::kSwiglu) {
        return common::Pack<T>::from_floats(silu(d[low]) * d[low + 4], silu(d[low + 1]) * d[low + 5]);
    } else if constexpr (Shape::kEpilogue == Epilogue::kResidual) {
        const float2 added = common::Pack<T>::to_floats(residual);
        return common::Pack<T>::from_floats(d[low] + added.x, d[low + 1] + added.y);
    } else {
        return common::Pack<T>::from_floats(d[low], d[low + 1]);
    }
}

// Box `box` of a warpgroup's accumulators to the buffer at `buffer`.
template <typename T, typename Shape>
__device__ __forceinline__ void stage_box(const float (&d)[Shape::kFragment], uint32_t buffer, int box) {
    constexpr int kApart =
        Shape::kEpilogue == Epilogue::kSwiglu ? 8 : 4;  // accumulators from one 8 columns to the next
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t row = buffer + (warp * 16 + lane % 16) * (kBoxColumns * 2);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of 8 columns: matrices (rows 0 to 7, rows 8 to 15) of each
        const uint32_t address = row + (((2 * pair + lane / 16) ^ (lane % 8)) * 16);
        const int eight = box_column<Shape>(box) / 8 + 2 * pair;
        uint32_t words[4] = {};
        if constexpr (Shape::kEpilogue == Epilogue::kResidual) common::ldmatrix_x4(words, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = finish<T, Shape>(d, (eight + i / 2) * kApart + i % 2 * 2, words[i]);
        stmatrix_x4(address, words);
    }
    common::fence_async_proxy();
}

// A warpgroup's accumulators to its staging buffers, in the order of BoxWalk.
template <typename T, typename Shape>
__device__ __forceinline__ void stage_tile(const float (&d)[Shape::kUnits][Shape::kFragment], const Shared<Shape>& s,
                                           int group, Cursor<Shape::kBuffers>& at) {
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box, at.advance()) {
        const int buffer = group * Shape::kBuffers + at.slot;
        common::mbarrier_wait(s.ready + 8 * buffer, at.parity);
        stage_box<T, Shape>(d[box / Shape::kUnitBoxes], s.buffers + buffer * kBufferBytes, box);
        common::mbarrier_arrive(s.staged + 8 * buffer);
    }
}

template <typename T, typename Shape>
__device__ void multiply_tiles(const Tiling& t, const Exchange& exchange, const Shared<Shape>& s, int group) {
    const int lane = threadIdx.x % 32;
    constexpr int kUnitBytes = kUnitTokens * kStageColumns * 2;
    const uint64_t first_x = operand(s.ring + group * Shape::kUnits * kUnitBytes),
                   first_weight = operand(s.ring + Shape::kXBytes);
    Cursor<Shape::kStages> at;
    Cursor<Shape::kBuffers> buffer;
    auto release = [&](int slot) {
        if (lane < kCluster) common::arrive_remote(common::in_block(s.empty + 8 * slot, lane));
    };
    for (TileWalk walk{t, s.claims}; !walk.done(); walk.advance()) {
        const Tile tile = tile_at<Shape>(t, walk.index);
        float d[Shape::kUnits][Shape::kFragment];
        int before = 0;
        for (int step = 0; step < tile.steps; ++step, at.advance()) {
            common::mbarrier_wait(s.full + 8 * at.slot, at.parity);
            const int stage = at.slot * (Shape::kStageBytes / 16);  // in the units of operands
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStageColumns / 16; ++k)  // 32 bytes further along the rows
#pragma unroll
                for (int unit = 0; unit < Shape::kUnits; ++unit)
                    wgmma<T, Shape::kRows>(d[unit], first_x + stage + unit * (kUnitBytes / 16) + 2 * k,
                                           first_weight + stage + 2 * k, k > 0 || step > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(before);
            before = at.slot;
        }
        wgmma_wait<0>();
        release(before);
        if constexpr (Shape::kSplits > 1) exchange_sums<Shape>(d[0], exchange, tile.part);
        if constexpr (Shape::kInRing) {
            common::mbarrier_wait(s.full + 8 * at.slot, at.parity);
            common::mbarrier_wait(s.ready + 8 * group, buffer.parity);
#pragma unroll
            for (int box = 0; box < Shape::kBoxes; ++box)
                stage_box<T, Shape>(d[0], s.in_stage(at.slot, group, box), box);
            common::mbarrier_arrive(s.staged + 8 * group);
            at.advance(), buffer.advance();
        } else {
            stage_tile<T, Shape>(d, s, group, buffer);
        }
    }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ TensorMaps maps, Tiling tiling, Exchange exchange) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared_memory[];
    const uint32_t start = common::uniform(common::shared_address(shared_memory));
    const auto s = Shared<Shape>::at((start + 1023) / 1024 * 1024);
    const int rank = common::cluster_rank(), warp = common::uniform_warp();
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::kStages; ++i) {
            common::mbarrier_init(s.full + 8 * i, 1);
            common::mbarrier_init(s.empty + 8 * i, kMathWarps * kCluster);  // each warp that reads it
        }
        for (int i = 0; i < kMathGroups * Shape::kBuffers; ++i) {
            common::mbarrier_init(s.ready + 8 * i, 1);
            common::mbarrier_init(s.staged + 8 * i, 128);
        }
        for (int i = 0; i < kClaimSlots; ++i) common::mbarrier_init(s.claims.barrier(i), 1);
        common::fence_barrier_init();
    }
    __syncwarp();
    common::cluster_arrive();
    common::cluster_wait();

    if (warp >= kMathWarps) {
        lower_registers<kMoveRegisters>();
        const int mover = warp - kMathWarps;
        if (common::elect_one()) {
            if (mover == 0) load_tiles<Shape>(maps, tiling, s, rank);
            if (mover == 1 || mover == 2) {
                if constexpr (Shape::kInRing) {
                    store_stages<Shape>(maps, tiling, s, rank, mover - 1);
                } else {
                    store_tiles<Shape>(maps, tiling, s, rank, mover - 1);
                }
            }
        }
    } else {
        raise_registers<kMathRegisters>();
        multiply_tiles<T, Shape>(tiling, exchange, s, warp / 4);
    }
    __syncwarp();
    common::cluster_arrive();
    common::cluster_wait();  // the other block may still send weights and arrivals here
#endif
}

}  // namespace gemm
