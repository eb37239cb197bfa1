// Split-KV flash-decode: one query token a row against its cached keys and values, one launch.
//
// Grid: about one block a multiprocessor, whatever the lengths; block i takes range (grid - 1 - i) of
// schedule.cuh. Block: kComputeWarps warps that compute, one that loads tiles and one that prepares queries, both as
// far ahead as shared memory allows. A tile is 64 tokens of one kv head, K and V apart; warps 0-3 take the even tiles
// of the range together, warps 4-7 the odd ones (tile_math.cuh). At the end of a piece the two groups are merged; a
// whole unit is written, a cut one published for, or collected by, the block that holds the unit's first tile.
//
// kFused: `q` is the packed qkv row of the new token, `lengths` its position. The block that finishes a unit rotates
// and appends the new key and value and attends to them; the loads of old tiles depend on nothing but `lengths`.
#pragma once
#include "decode_attn/merge.cuh"
#include "decode_attn/query.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

constexpr int kTileBarrier = 1;  // and the next: one of each tile group
// Of all warps but the loading one, which waits at the next, for warp 0 alone: a barrier of the whole block would have
// to be in one place for all warps.
constexpr int kStartBarrier = 3;
static_assert(SharedLayout::kShare + sizeof(Share) <= SharedLayout::kTileExchange);
constexpr int kLoadWarp = kComputeWarps, kQueryWarp = kComputeWarps + 1;

// Where things lie in shared memory.
template <int kHeadDim>
struct Shared {
    static constexpr int kSlots = QuerySlot<kHeadDim>::kCount;
    Ring ring;
    uint32_t slot_barriers;   // full [kSlots], empty [kSlots]
    uint32_t merge_barriers;  // [kWarpsPerTile], each of two warps, one of either tile group: a piece ends
    uint32_t share_barrier;   // `share` and the rows are there
    QuerySlot<kHeadDim>* slots;
    Share* share;
    TileExchange* tile_exchange;
    GroupExchange* group_exchange;

    __device__ Shared(unsigned char* memory, const SharedLayout& layout, int stages) {
        const uint32_t base = common::shared_address(memory);
        ring = {base + SharedLayout::kRing, base + SharedLayout::kBarriers, stages};
        slot_barriers = base + SharedLayout::kBarriers + 4 * kMaxStages * 8;
        merge_barriers = base + SharedLayout::kMergeBarriers;
        share_barrier = base + SharedLayout::kShareBarrier;
        slots = reinterpret_cast<QuerySlot<kHeadDim>*>(memory + layout.queries);
        share = reinterpret_cast<Share*>(memory + SharedLayout::kShare);
        tile_exchange = reinterpret_cast<TileExchange*>(memory + SharedLayout::kTileExchange);
        group_exchange = reinterpret_cast<GroupExchange*>(memory + SharedLayout::kGroupExchange);
    }
};

// What a computing warp does, from the first piece to the last.
template <typename T, int kHeadDim, bool kFused>
__device__ __forceinline__ void compute(const Params& p, const Shared<kHeadDim>& shared, int range, int warp,
                                        int lane) {
    using State = GroupState<kHeadDim>;
    const SliceAddress<kHeadDim> at(warp, lane);
    const Ring& ring = shared.ring;
    const int group = warp / kWarpsPerTile, slice = warp % kWarpsPerTile;
    TileExchange& exchange = shared.tile_exchange[group];
    const uint32_t weights = common::shared_address(exchange.weights);
    RingCursor slot{0}, cursor{group};
    int next = group;  // tile of this group, counted from the start of the range
    int index = 0;     // first tile of the piece
    for (int turn = 0;; turn ^= 1) {
        common::mbarrier_wait(shared.slot_barriers + slot.stage * 8, slot.phase);
        const QuerySlot<kHeadDim>& query = shared.slots[slot.stage];
        const Piece piece = query.piece;
        if (piece.tiles < 0) return;
        QueryFragments<kHeadDim> q;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
            const uint2 pair = query.fragments[i][lane];
            q.b[i][0] = pair.x;
            q.b[i][1] = pair.y;
        }
        State state = State::empty();
        if (kFused && group == 0 && piece.others >= 0) {  // the new token first, with weight 1
            const float2 score = *reinterpret_cast<const float2*>(&query.new_score[2 * (lane & 3)]);
            state.max[0] = score.x;
            state.max[1] = score.y;
            state.sum[0] = state.sum[1] = state.sum[2] = state.sum[3] = 1.0f;
#pragma unroll
            for (int part = 0; part < State::kParts; ++part) {
                const T* value = reinterpret_cast<const T*>(query.new_value) + State::column(warp, part) + lane / 4;
                state.o[part][0] = state.o[part][1] = common::Pack<T>::to_float(value[0]);
                state.o[part][2] = state.o[part][3] = common::Pack<T>::to_float(value[8]);
            }
        }
        common::mbarrier_arrive(shared.slot_barriers + (shared.kSlots + slot.stage) * 8);
        slot.advance(1, shared.kSlots);

#pragma unroll 1
        for (; next < index + piece.tiles; next += kTileGroups) {
            const int tokens = piece.tokens - (next - index) * kBlockSize - slice * kSliceTokens;
            const uint32_t k_tile = ring.tile<kHeadDim>(cursor.stage, 0), v_tile = ring.tile<kHeadDim>(cursor.stage, 1);
            float s[4];
            common::mbarrier_wait(ring.full(cursor.stage, 0), cursor.phase);
            slice_scores<T, kHeadDim>(s, q, k_tile, at);
            common::release_stage_behind(ring.empty(cursor.stage, 0), lane, s[0]);
            exchange_max(s, tokens, p.scale_log2, exchange, slice, lane);
            common::named_sync(kTileBarrier + group, kWarpsPerTile * 32);
            exchange_weights<T, kHeadDim>(state, s, exchange, slice, lane);
            if (tokens < kSliceTokens) {
                common::mbarrier_wait(ring.full(cursor.stage, 1), cursor.phase);
                clear_values<kHeadDim>(v_tile, tokens, slice, lane);
            }
            common::named_sync(kTileBarrier + group, kWarpsPerTile * 32);
            common::mbarrier_wait(ring.full(cursor.stage, 1), cursor.phase);
            add_values<T, kHeadDim>(state, weights, v_tile, at, lane);
            common::release_stage_behind(ring.empty(cursor.stage, 1), lane, state.last_values());
            cursor.advance(kTileGroups, ring.stages);
        }
        index += piece.tiles;

        Result result;
        const auto sync = [&] {  // no named barrier: racecheck follows those of part of a block only in part
            common::mbarrier_arrive(shared.merge_barriers + slice * 8);
            common::mbarrier_wait(shared.merge_barriers + slice * 8, turn);
        };
        const int column = merge_groups<kHeadDim>(result, state, shared.group_exchange[turn], sync, warp, lane);
        if (column < 0) continue;
        if (piece.others < 0) {
            publish(result, p, range, piece.buffer, column, lane);
        } else {
            T* out = output_of<T>(p, piece.row, piece.head, column, lane);
            asm volatile("" : "+l"(out));  // now, not after the wait for the others
            if (piece.others > 0) collect(result, p, range + 1, piece.others, piece.buffer, column, lane);
            write_output(result, p, out, piece.row, piece.head, column, lane);
        }
    }
}

// On Hopper, head size 64 leaves registers for a block of the kernel before this one: with programmatic dependent
// launch the way to the first load is then gone while that kernel's last blocks still work. 128 would spill, and its
// ring leaves no room; sm_120 would spill.
template <int kHeadDim>
constexpr int min_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    return kHeadDim == 64 ? 2 : 1;
#else
    return 1;
#endif
}

template <typename T, int kHeadDim, Loader kLoader, bool kFused>
__global__ void __launch_bounds__(kThreads, min_blocks<kHeadDim>())
    decode_attn_kernel(const __grid_constant__ Params p, const __grid_constant__ TensorMaps maps) {
#if __CUDA_ARCH__ >= 900
    constexpr bool kAvailable = true;
#else
    constexpr bool kAvailable = kLoader != Loader::kTma;
#endif
    if constexpr (kAvailable) {
        extern __shared__ __align__(1024) unsigned char memory[];
        const SharedLayout layout = SharedLayout::of(kHeadDim, p.batch, p.stages);
        const Shared<kHeadDim> shared(memory, layout, p.stages);
        Rows rows(reinterpret_cast<int*>(memory + layout.rows), p);
        const int warp = common::uniform_warp(), lane = threadIdx.x % 32;
        const int range = gridDim.x - 1 - blockIdx.x;
        const float inverse_blocks = inverse(static_cast<float>(gridDim.x));

        // The way to the first load is the longest at the start, so the loading warp does nothing else, and its code
        // comes first: instructions further on arrive later.
        if (warp == kLoadWarp) {
            if (kLoader == Loader::kTma && common::elect_one()) {
                common::tma_prefetch_map(&maps.k.tile);
                common::tma_prefetch_map(&maps.v.tile);
            }
            if (!kFused) common::wait_for_previous_kernel();
            int my_block = 0;
            TableGuess guess;
            const Share share = Share::find(
                p, rows, range, inverse_blocks, lane,
                [&] {
                    if (kLoader == Loader::kTma) guess.ask(p, range, inverse_blocks, lane);
                    common::named_sync(kStartBarrier + 1, 2 * 32);
                },
                [&](const Share& share) {
                    if (lane == 0) *shared.share = share;
                    common::mbarrier_arrive(shared.share_barrier);
                    if (share.tiles > 0)
                        my_block = load_first_keys<T, kHeadDim, kLoader>(p, maps, share.walk, share.tiles, guess,
                                                                         shared.ring, lane);
                });
            if (share.tiles > 0)
                load_tiles<T, kHeadDim, kLoader>(p, maps, rows, share.walk, share.tiles, my_block, shared.ring, lane);
            asm volatile("exit;");  // after a return the assembler would put this code last
        }
        if (warp == kQueryWarp) {
            common::allow_next_kernel();
        } else if (common::elect_one()) {  // the barriers, each an instruction of some fifty cycles
#pragma unroll 1
            for (int i = warp; i < 4 * p.stages; i += kComputeWarps) {
                const int full = kLoader == Loader::kTma ? 1 : 32;
                common::mbarrier_init(shared.ring.barriers + i * 8, i % 4 < 2 ? full : kWarpsPerTile);
            }
#pragma unroll 1
            for (int i = warp; i < 2 * shared.kSlots; i += kComputeWarps)
                common::mbarrier_init(shared.slot_barriers + i * 8, i < shared.kSlots ? 32 : kComputeThreads);
            if (warp < kWarpsPerTile)
                common::mbarrier_init(shared.merge_barriers + warp * 8, kTileGroups * 32);
            else if (warp == kWarpsPerTile)
                common::mbarrier_init(shared.share_barrier, 32);
            common::fence_barrier_init();
        }
        common::named_sync(kStartBarrier, kThreads - 32);
        if (warp == 0) common::named_arrive(kStartBarrier + 1, 2 * 32);
        common::wait_for_previous_kernel();
        if (warp == kQueryWarp) {
            const RangeState state = *RangeState::of(p, range);
            common::mbarrier_wait(shared.share_barrier, 0);
            const Share share = *shared.share;
            QueryWarp<T, kHeadDim, kFused>{
                p, rows, shared.slots, shared.slot_barriers, shared.slot_barriers + shared.kSlots * 8, state, lane}
                .run({p, rows, share, range, lane});
        } else {
            compute<T, kHeadDim, kFused>(p, shared, range, warp, lane);
        }
    }
}

}  // namespace decode_attn
