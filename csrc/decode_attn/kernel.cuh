// Split-KV flash-decode: one query token a row against its cached keys and values, one launch.
//
// Grid: one block a multiprocessor, whatever the batch and the lengths; block i takes range (grid - 1 - i) of schedule.cuh.
// Block: kConsumerWarps warps that compute and one that loads. The loader fills a ring of (K, V) tiles as far ahead as
// shared memory allows. A tile is 64 tokens of one kv head; warps 0-3 take the even tiles of the range, warps 4-7 the odd
// ones, 16 tokens a warp, each at its own pace with its own softmax state. At the end of a piece the eight states are
// merged; a whole unit is written, a cut one published for, or collected by, the block that holds the unit's first tile.
//
// kFused: `q` is the packed qkv row of the new token, `lengths` its position. The block that finishes a unit rotates and
// appends the new key and value and attends to them; the loads of old tiles depend on nothing but `lengths`.
#pragma once
#include "decode_attn/merge.cuh"
#include "decode_attn/query.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

constexpr int kNewTokenWarp = kConsumerWarps - 1;  // idle when the range has a single tile

struct Piece {
    int row, head, tiles;    // tiles of the unit in this range
    int tokens;              // of the unit, from the first of these tiles on
    bool finishes;           // holds the unit's first tile
    int last_range;          // where the unit ends
};

// Everything that happens to one piece. `cursor` points at the next tile of this warp's group, `index` at the piece's first.
template <typename T, int kHeadDim, bool kFused>
__device__ void attend_piece(const Params& p, const Rows& rows, const Piece& piece, int range, int index, RingCursor& cursor, int& next,
                             uint32_t ring, uint32_t full, uint32_t empty, float* merge, SoftmaxState* stats, int warp, int lane) {
    const SliceAddress at(warp % kWarpsPerTile, lane);
    QueryFragments<kHeadDim> q;
    WarpState<kHeadDim> state;
    state.init();
    load_query<T, kHeadDim, kFused>(q, p, piece.row, piece.head, rows.tokens[piece.row], lane);
    if constexpr (kFused) {
        if (piece.finishes && warp == kNewTokenWarp) {
            const int position = rows.tokens[piece.row], index_in_row = position / kBlockSize;
            const int block = p.block_table ? __ldg(p.block_table + piece.row * p.stride_table_row + index_in_row)
                                            : rows.slots[piece.row] * p.blocks_per_slot + index_in_row;
            attend_new_token<T, kHeadDim>(state, q, p, piece.row, piece.head, position, block, lane);
        }
    }
    for (; next < index + piece.tiles; next += kTileGroups) {
        const int tokens = piece.tokens - (next - index) * kBlockSize - (warp % kWarpsPerTile) * kSliceTokens;
        common::mbarrier_wait(full + cursor.stage * 8, cursor.phase);
        if (tokens > 0) attend_slice<T>(state, q, ring + cursor.stage * 2 * tile_bytes(kHeadDim), at, tokens, p.scale_log2, lane);
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(empty + cursor.stage * 8);
        cursor.advance(kTileGroups, p.stages);
    }

    common::named_sync(kMergeBarrier, kConsumerThreads);  // the previous piece has been read
    stage_warp_state<kHeadDim>(state, merge, stats, p.group, warp, lane);
    common::named_sync(kMergeBarrier, kConsumerThreads);
    for (int pair = warp * 32 + lane; pair < p.group * (kHeadDim / 2); pair += kConsumerThreads) {
        const int head = pair / (kHeadDim / 2), column = pair % (kHeadDim / 2) * 2;
        ColumnPair total = merge_warps<kHeadDim>(merge, stats, p.group, head, column);
        if (!piece.finishes) {
            publish<kHeadDim>(total, p.partials, range, p.group, head, column, lane);
            continue;
        }
        if (piece.last_range > range) collect<kHeadDim>(total, p.partials, range + 1, piece.last_range, p.group, head, column, lane);
        write_output<T>(total, p, piece.row, piece.head * p.group + head, column);
    }
}

template <typename T, int kHeadDim, Loader kLoader, bool kFused>
__global__ void __launch_bounds__(kThreads, 1) decode_attn_kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMaps maps) {
#if __CUDA_ARCH__ >= 900
    constexpr bool kAvailable = true;
#else
    constexpr bool kAvailable = kLoader != Loader::kTma;
#endif
    if constexpr (kAvailable) {
        extern __shared__ __align__(1024) unsigned char memory[];
        const SharedLayout layout = SharedLayout::of(kHeadDim, p.group, p.batch, p.stages);
        const uint32_t ring = common::shared_address(memory);
        const uint32_t full = ring + layout.barriers, empty = full + kMaxStages * 8;
        Rows rows(reinterpret_cast<int*>(memory + layout.rows), p);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int range = gridDim.x - 1 - blockIdx.x;

        if (warp == kConsumerWarps) {
            common::allow_next_kernel();
            if (kLoader == Loader::kTma && lane == 0) {
                common::tma_prefetch_map(&maps.k);
                common::tma_prefetch_map(&maps.v);
            }
            if (lane < p.stages) {
                common::mbarrier_init(full + lane * 8, kLoader == Loader::kTma ? 1 : 32);
                common::mbarrier_init(empty + lane * 8, kWarpsPerTile);
                common::fence_barrier_init();
            }
            if (!kFused) common::wait_for_previous_kernel();
            rows.fill(p, lane);
            common::named_arrive(0, kThreads);
            const Split split = Split::of(rows.total(), gridDim.x, p.min_tiles);
            load_tiles<T, kHeadDim, kLoader>(p, maps, rows, split.begin(range), split.begin(range + 1), ring, full, empty, lane);
            return;
        }

        common::wait_for_previous_kernel();
        common::named_sync(0, kThreads);
        float* merge = reinterpret_cast<float*>(memory + layout.merge);
        SoftmaxState* stats = reinterpret_cast<SoftmaxState*>(memory + layout.stats);
        const Split split = Split::of(rows.total(), gridDim.x, p.min_tiles);
        const int begin = split.begin(range), end = split.begin(range + 1);
        RingCursor cursor{warp / kWarpsPerTile};
        int next = warp / kWarpsPerTile;  // of this warp's group, counted from `begin`

        // Rows without a cached token have no tile and so belong to no range: block `range` sees to rows range, range + grid, ...
        int empty_row = range, empty_head = 0;
        const auto skip_rows = [&] {  // to the next row of this block that is only a new token; inactive rows become zero
            for (; empty_row < p.batch; empty_row += gridDim.x) {
                if (kFused && rows.tokens[empty_row] == 0) return;
                if (rows.tokens[empty_row] <= 0) write_zeros<T, kHeadDim>(p, empty_row);
            }
        };
        skip_rows();

        for (int tile = begin; tile < end || (kFused && empty_row < p.batch);) {
            Piece piece;
            if (kFused && empty_row < p.batch) {
                piece = {empty_row, empty_head, 0, 0, true, range};
                if (++empty_head == p.num_kv_heads) {
                    empty_head = 0;
                    empty_row += gridDim.x;
                    skip_rows();
                }
            } else {
                const Rows::Tile first = rows.locate(tile);
                piece.row = first.row;
                piece.head = first.head;
                piece.tiles = min(first.count - first.index, end - tile);
                piece.tokens = rows.tokens[first.row] - first.index * kBlockSize;
                piece.finishes = first.index == 0;
                piece.last_range = split.range_of(tile - first.index + first.count - 1);
            }
            attend_piece<T, kHeadDim, kFused>(p, rows, piece, range, tile - begin, cursor, next, ring, full, empty, merge, stats, warp, lane);
            tile += piece.tiles;
        }
    }
}

}  // namespace decode_attn
