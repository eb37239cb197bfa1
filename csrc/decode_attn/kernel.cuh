// Split-KV flash-decode: one query token a row against its cached keys and values, one launch.
//
// Grid: one block a multiprocessor, whatever the batch and the lengths; block i takes range (grid - 1 - i) of
// schedule.cuh. Block: kConsumerWarps warps that compute and one that loads. The loader fills a ring of (K, V) tiles as
// far ahead as shared memory allows. A tile is 64 tokens of one kv head; warps 0-3 take the even tiles of the range,
// warps 4-7 the odd ones, 16 tokens a warp, each at its own pace with its own softmax state. At the end of a piece the
// eight states are merged; a whole unit is written, a cut one published for, or collected by, the block that holds the
// unit's first tile.
//
// kFused: `q` is the packed qkv row of the new token, `lengths` its position. The block that finishes a unit rotates
// and appends the new key and value and attends to them; the loads of old tiles depend on nothing but `lengths`.
#pragma once
#include "decode_attn/merge.cuh"
#include "decode_attn/query.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

constexpr int kNewTokenWarp = kConsumerWarps - 1;  // idle when the range has a single tile

struct Piece {
    int row, head, tiles;  // tiles of the unit in this range
    int tokens;            // of the unit, from the first of these tiles on
    bool finishes;         // holds the unit's first tile
    int last_range;        // where the unit ends
};

// Where things lie in shared memory.
struct Shared {
    uint32_t ring, full, empty;  // addresses: tiles, and the barriers of each stage
    float* states;               // of the warps
    SoftmaxState* stats;
};

// Merges the warps' states in shared memory; writes the output, or publishes the state for the block that finishes the
// unit.
template <typename T, int kHeadDim>
__device__ void finish_piece(const Params& p, const Shared& shared, const Piece& piece, int range, int lane) {
#pragma unroll 1
    for (int pair = threadIdx.x; pair < p.group * (kHeadDim / 2); pair += kConsumerThreads) {
        const int head = pair / (kHeadDim / 2), column = pair % (kHeadDim / 2) * 2;
        ColumnPair total = merge_warps<kHeadDim>(shared.states, shared.stats, p.group, head, column);
        if (!piece.finishes) {
            publish<kHeadDim>(total, p.partials, range, p.group, head, column, lane);
            continue;
        }
        if (piece.last_range > range) {
            collect<kHeadDim>(total, p.partials, range + 1, piece.last_range, p.group, head, column, lane);
        }
        write_output<T>(total, p, piece.row, piece.head * p.group + head, column);
    }
}

// Everything that happens to one piece. `cursor` points at the next tile of this warp's group, `index` at the piece's
// first.
template <typename T, int kHeadDim, bool kFused>
__device__ void attend_piece(const Params& p, const Rows& rows, const Shared& shared, const Piece& piece, int range,
                             int index, RingCursor& cursor, int& next, int warp, int lane) {
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
        common::mbarrier_wait(shared.full + cursor.stage * 8, cursor.phase);
        if (tokens > 0)
            attend_slice<T>(state, q, shared.ring + cursor.stage * 2 * tile_bytes(kHeadDim), at, tokens, p.scale_log2,
                            lane);
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(shared.empty + cursor.stage * 8);
        cursor.advance(kTileGroups, p.stages);
    }

    common::named_sync(kMergeBarrier, kConsumerThreads);  // the previous piece has been read
    stage_warp_state<kHeadDim>(state, shared.states, shared.stats, p.group, warp, lane);
    common::named_sync(kMergeBarrier, kConsumerThreads);
    finish_piece<T, kHeadDim>(p, shared, piece, range, lane);
}

template <typename T, int kHeadDim, Loader kLoader, bool kFused>
__global__ void __launch_bounds__(kThreads, 1)
    decode_attn_kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMaps maps) {
#if __CUDA_ARCH__ >= 900
    constexpr bool kAvailable = true;
#else
    constexpr bool kAvailable = kLoader != Loader::kTma;
#endif
    if constexpr (kAvailable) {
        extern __shared__ __align__(1024) unsigned char memory[];
        const SharedLayout layout = SharedLayout::of(kHeadDim, p.group, p.batch, p.stages);
        const uint32_t base = common::shared_address(memory), full = base + SharedLayout::kBarriers;
        const Shared shared{base + SharedLayout::kRing, full, full + kMaxStages * 8,
                            reinterpret_cast<float*>(memory + layout.states),
                            reinterpret_cast<SoftmaxState*>(memory + SharedLayout::kStats)};
        Rows rows(reinterpret_cast<int*>(memory + layout.rows), p);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int range = gridDim.x - 1 - blockIdx.x;

        // The loading warp reads the lengths; meanwhile the others initialise the barriers, each an instruction of some
        // fifty cycles.
        if (warp == kConsumerWarps) {
            common::allow_next_kernel();
            if (kLoader == Loader::kTma && lane == 0) {
                common::tma_prefetch_map(&maps.k);
                common::tma_prefetch_map(&maps.v);
            }
            if (!kFused) common::wait_for_previous_kernel();
            rows.fill(p, lane);
        } else if (lane == 0) {
#pragma unroll 1
            for (int stage = warp; stage < p.stages; stage += kConsumerWarps) {
                common::mbarrier_init(shared.full + stage * 8, kLoader == Loader::kTma ? 1 : 32);
                common::mbarrier_init(shared.empty + stage * 8, kWarpsPerTile);
            }
            common::fence_barrier_init();
        }
        const float inverse_blocks = Quotient::inverse(gridDim.x);
        __syncthreads();
        const Split split = Split::of(rows.total(), gridDim.x, inverse_blocks, p.min_tiles);
        const int begin = split.begin(range), end = split.begin(range + 1);
        if (warp == kConsumerWarps) {
            load_tiles<T, kHeadDim, kLoader>(p, maps, rows, begin, end, shared.ring, shared.full, shared.empty, lane);
            return;
        }

        common::wait_for_previous_kernel();
        RingCursor cursor{warp / kWarpsPerTile};
        int next = warp / kWarpsPerTile;  // of this warp's group, counted from `begin`

        // Rows without a cached token have no tile and so belong to no range: block `range` sees to rows range, range +
        // grid, ...
        int empty_row = range, empty_head = 0;
        const auto skip_rows =
            [&] {  // to the next row of this block that is only a new token; inactive rows become zero
                for (; empty_row < p.batch; empty_row += gridDim.x) {
                    if (kFused && rows.tokens[empty_row] == 0) return;
                    if (rows.tokens[empty_row] <= 0) write_zeros<T, kHeadDim>(p, empty_row);
                }
            };
        skip_rows();

        int row = begin < end ? rows.row_of(begin, lane) : 0;
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
                const Rows::Tile first = rows.locate(tile, row);
                piece.row = row = first.row;
                piece.head = first.head;
                piece.tiles = min(first.count - first.index, end - tile);
                piece.tokens = rows.tokens[first.row] - first.index * kBlockSize;
                piece.finishes = first.index == 0;
                piece.last_range = split.range_of(tile - first.index + first.count - 1);
            }
            attend_piece<T, kHeadDim, kFused>(p, rows, shared, piece, range, tile - begin, cursor, next, warp, lane);
            tile += piece.tiles;
        }
    }
}

}  // namespace decode_attn
