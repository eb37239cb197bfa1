// The loading warp: it walks the block's range tile by tile and keeps the ring full, across unit borders, never waiting
// for anything but a free stage.
//
// A stage holds the K tile, then the V tile, [panel][64 tokens][128 bytes], the 16-byte chunk c of token t at c ^ (t %
// 8): the copy engine's 128-byte swizzle, under which ldmatrix meets no bank conflict. The cp.async twin writes the
// same places.
#pragma once
#include "common/async.cuh"
#include "decode_attn/schedule.cuh"

namespace decode_attn {

enum class Loader : int { kCpAsync = 0, kTma = 1 };

// A position in the ring; moves by `step` <= stages.
struct RingCursor {
    int stage;
    uint32_t phase = 0;
    __device__ void advance(int step, int stages) {
        stage += step;
        if (stage >= stages) {
            stage -= stages;
            phase ^= 1;
        }
    }
};

// Where the 16-byte chunk `chunk` of a token lies in a staged tile.
__device__ __forceinline__ uint32_t staged_offset(int token, int chunk) {
    return (chunk / 8) * (kBlockSize * kStagedRowBytes) + token * kStagedRowBytes + ((chunk ^ token) & 7) * 16;
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_tile_async(uint32_t target, const T* source, int64_t stride_token, int tokens,
                                                int lane) {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a token
#pragma unroll 8
    for (int i = lane; i < tokens * kChunks; i += 32) {
        const int token = i / kChunks, chunk = i % kChunks;
        common::cp_async_16(target + staged_offset(token, chunk), source + token * stride_token + chunk * 8);
    }
}

// Shared addresses of the ring's tiles and barriers.
struct Ring {
    uint32_t tiles, barriers;
    int stages;

    template <int kHeadDim>
    __device__ uint32_t tile(int stage, int value) const {
        return tiles + (2 * stage + value) * tile_bytes(kHeadDim);
    }
    __device__ uint32_t full(int stage, int value) const { return barriers + (4 * stage + value) * 8; }
    __device__ uint32_t empty(int stage, int value) const { return barriers + (4 * stage + 2 + value) * 8; }
};

// By the copy engine, in one box, or of a tile that is not full in as few small ones as hold its tokens.
template <int kHeadDim>
__device__ __forceinline__ void copy_tile_bulk(uint32_t target, const CacheMaps& map, uint32_t full, int block,
                                               int head, int tokens) {
    if (tokens > kBlockSize - kBoxTokens) {
        common::mbarrier_expect(full, tile_bytes(kHeadDim));
        common::tma_load_5d(target, &map.tile, full, 0, 0, 0, head, block);
        return;
    }
    common::mbarrier_expect(full, ceil_div(tokens, kBoxTokens) * kBoxTokens * kHeadDim * 2);
#pragma unroll 1
    for (int token = 0; token < tokens; token += kBoxTokens) {
#pragma unroll
        for (int panel = 0; panel < kHeadDim / 64; ++panel)
            common::tma_load_5d(target + staged_offset(token, 8 * panel), &map.part, full, 0, token, panel, head,
                                block);
    }
}

// Requests the K (value = 0) or V (1) tile of (block, head) into the stage at `cursor`, once that is free; of the
// first, which is fresh, that is known.
template <typename T, int kHeadDim, Loader kLoader, bool kFresh = false>
__device__ __forceinline__ void load_tile(const Params& p, const TensorMaps& maps, const Ring& ring, RingCursor cursor,
                                          int value, int block, int head, int tokens, int lane) {
    const uint32_t target = ring.tile<kHeadDim>(cursor.stage, value), full = ring.full(cursor.stage, value);
    if constexpr (kLoader == Loader::kTma) {
        if (common::elect_one()) {
            if (!kFresh) common::mbarrier_wait(ring.empty(cursor.stage, value), cursor.phase);
            copy_tile_bulk<kHeadDim>(target, value ? maps.v : maps.k, full, block, head, tokens);
        }
    } else {
        if (!kFresh) common::mbarrier_wait(ring.empty(cursor.stage, value), cursor.phase);
        const T* source = value ? static_cast<const T*>(p.v_cache) + block * p.stride_v_block + head * p.stride_v_head
                                : static_cast<const T*>(p.k_cache) + block * p.stride_k_block + head * p.stride_k_head;
        copy_tile_async<T, kHeadDim>(target, source, value ? p.stride_v_token : p.stride_k_token, tokens, lane);
        common::cp_async_arrive(full);
    }
}

// The keys of the first of the block's `tiles` tiles. Returns the cache blocks of the first 32 that are in its unit,
// one a lane: a block table is then read only once before the first values are asked for.
template <typename T, int kHeadDim, Loader kLoader>
__device__ __forceinline__ int load_first_keys(const Params& p, const TensorMaps& maps, const Walk& walk, int tiles,
                                               const TableGuess& guess, const Ring& ring, int lane) {
    const int my_block = guess.block_of_lane(p, walk, min(walk.count - walk.index, tiles), lane);
    const int tokens = min(walk.tokens - walk.index * kBlockSize, kBlockSize);
    const int block = __shfl_sync(~0u, my_block, 0);
    load_tile<T, kHeadDim, kLoader, true>(p, maps, ring, {0}, 0, block, walk.head, tokens, lane);
    return my_block;
}

// The block's `tiles` tiles, at least one, the first of them at `walk`, without what load_first_keys has asked for;
// `my_block` is what it returned.
template <typename T, int kHeadDim, Loader kLoader>
__device__ __forceinline__ void load_tiles(const Params& p, const TensorMaps& maps, const Rows& rows, Walk walk,
                                           int tiles, int my_block, const Ring& ring, int lane) {
    struct {
        RingCursor cursor;
        int block, head, tokens;
    } now{{0, 1}, 0, 0, 0},
        last{};  // a fresh barrier's previous phase counts as complete: the first round does not wait
    bool first = true;
#pragma unroll 1
    while (true) {
        const int count = min(walk.count - walk.index, tiles);
        const int tokens = walk.tokens - walk.index * kBlockSize;
        now.head = walk.head;
#pragma unroll 1
        for (int done = 0; done < count; done += 32) {
            if (!first) my_block = walk.block_of_lane(p, done, count, lane);
#pragma unroll 1
            for (int i = 0; i < min(32, count - done); ++i) {
                now.block = __shfl_sync(~0u, my_block, i);
                now.tokens = min(tokens - (done + i) * kBlockSize, kBlockSize);
                // Values come one tile later: the first things needed are the scores of two tiles.
                if (!first) {
                    load_tile<T, kHeadDim, kLoader>(p, maps, ring, now.cursor, 0, now.block, now.head, now.tokens,
                                                    lane);
                    load_tile<T, kHeadDim, kLoader>(p, maps, ring, last.cursor, 1, last.block, last.head, last.tokens,
                                                    lane);
                }
                first = false;
                last = now;
                now.cursor.advance(1, ring.stages);
            }
        }
        tiles -= count;
        if (tiles == 0) break;
        walk.next_unit(rows);
    }
    load_tile<T, kHeadDim, kLoader>(p, maps, ring, last.cursor, 1, last.block, last.head, last.tokens, lane);
    if constexpr (kLoader == Loader::kCpAsync) asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace decode_attn
