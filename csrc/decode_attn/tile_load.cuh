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

template <typename T, int kHeadDim, Loader kLoader>
__device__ void load_tiles(const Params& p, const TensorMaps& maps, const Rows& rows, int begin, int end, uint32_t ring,
                           uint32_t full, uint32_t empty, int lane) {
    constexpr int kTileBytes = tile_bytes(kHeadDim);
    if (begin >= end) return;
    int row = rows.row_of(begin, lane);
    RingCursor cursor{0, 1};  // a fresh barrier's previous phase counts as complete: the first round does not wait
    for (int first = begin; first < end; first += 32) {
        // Each lane looks up one of the next 32 tiles.
        const Rows::Tile mine = rows.locate(min(first + lane, end - 1), row);
        row = __shfl_sync(~0u, mine.row, 31);
        const int my_block = p.block_table ? __ldg(p.block_table + mine.row * p.stride_table_row + mine.index)
                                           : rows.slots[mine.row] * p.blocks_per_slot + mine.index;
        const int my_tokens = min(rows.tokens[mine.row] - mine.index * kBlockSize, kBlockSize);
        for (int i = 0; i < min(32, end - first); ++i) {
            const int block = __shfl_sync(~0u, my_block, i), head = __shfl_sync(~0u, mine.head, i);
            const uint32_t stage = ring + cursor.stage * 2 * kTileBytes, ready = full + cursor.stage * 8;
            if constexpr (kLoader == Loader::kTma) {
                if (lane == 0) {
                    common::mbarrier_wait(empty + cursor.stage * 8, cursor.phase);
                    common::mbarrier_expect(ready, 2 * kTileBytes);
                    common::tma_load_5d(stage, &maps.k, ready, 0, 0, 0, head, block);
                    common::tma_load_5d(stage + kTileBytes, &maps.v, ready, 0, 0, 0, head, block);
                }
            } else {
                const int tokens = __shfl_sync(~0u, my_tokens, i);
                common::mbarrier_wait(empty + cursor.stage * 8, cursor.phase);
                const T* k = static_cast<const T*>(p.k_cache) + block * p.stride_k_block + head * p.stride_k_head;
                const T* v = static_cast<const T*>(p.v_cache) + block * p.stride_v_block + head * p.stride_v_head;
                copy_tile_async<T, kHeadDim>(stage, k, p.stride_k_token, tokens, lane);
                copy_tile_async<T, kHeadDim>(stage + kTileBytes, v, p.stride_v_token, tokens, lane);
                common::cp_async_arrive(ready);
            }
            cursor.advance(1, p.stages);
        }
    }
    if constexpr (kLoader == Loader::kCpAsync) asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace decode_attn
