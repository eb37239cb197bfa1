// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <cuda.h>

#include "common/types.cuh"

namespace decode_attn {

constexpr int kBlockSize = 64;      // tokens in a KV block; one (block, kv head) is one tile
constexpr int kMaxGroup = 8;        // query heads per kv head that one tensor-core tile holds
constexpr int kSliceTokens = 16;    // tokens that one warp takes of a tile
constexpr int kWarpsPerTile = kBlockSize / kSliceTokens;
constexpr int kTileGroups = 2;      // sets of warps that take alternate tiles
constexpr int kConsumerWarps = kWarpsPerTile * kTileGroups;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 32;  // and one warp that only loads
constexpr int kMaxStages = 12;
constexpr uint32_t kEmptyWord = 0xFFFFBEEFu;  // a word of a partial that nobody has published yet (merge.cuh)
constexpr int kStagedRowBytes = 128;  // a tile lies in shared memory as panels of 64 columns: 64 rows of 128 bytes, swizzled

// Floats that one block publishes for a unit that another block finishes: O [group][head_dim], then for every warp-wide
// part of a head (64 columns) the pair (max, sum).
constexpr int partial_floats(int head_dim) { return kMaxGroup * (head_dim + 2 * head_dim / 64); }
constexpr int kPartialFloats = partial_floats(128);

constexpr int tile_bytes(int head_dim) { return kBlockSize * head_dim * 2; }

// All strides in elements. "Rows" are sequences of the batch; shapes are those of the Python operator.
struct Params {
    const void* q;             // [batch, num_heads, head_dim]; fused: qkv [batch, (num_heads + 2 num_kv_heads) * head_dim]
    const void* k_cache;       // [num_blocks, num_kv_heads, 64, head_dim]
    const void* v_cache;
    void* out;                 // [batch, num_heads, head_dim]
    float* lse;                // [batch, num_heads] contiguous, natural logarithm; or null
    const int* lengths;        // [batch] tokens in the cache: context_lens, or positions when fused (< 0: inactive row)
    const int* slots;          // [batch] row -> slot of the static cache; null: row i is slot i
    const int* block_table;    // [batch, ...] or null: block t of a row is slot * blocks_per_slot + t
    float* partials;           // [grid, kPartialFloats], every word kEmptyWord between launches
    const float* cos;          // fused only: [positions, head_dim / 2]
    const float* sin;
    int64_t stride_q_row, stride_q_head, stride_out_row, stride_out_head;
    int64_t stride_k_block, stride_k_head, stride_k_token, stride_v_block, stride_v_head, stride_v_token;
    int64_t stride_table_row;
    int batch, num_kv_heads, group;  // group = num_heads / num_kv_heads
    int blocks_per_slot;
    int stages;                // tiles (K and V) that the ring in shared memory holds
    int min_tiles;             // a block gets at least this many tiles
    float scale_log2;          // softmax scale * log2(e)
};

// Both caches as 5-D tensors (column, token, panel, kv head, block).
struct TensorMaps {
    CUtensorMap k, v;
};

// Dynamic shared memory, in this order.
struct SharedLayout {
    int ring, merge, stats, rows, barriers, bytes;  // offsets and the total

    __host__ __device__ static SharedLayout of(int head_dim, int group, int batch, int stages) {
        SharedLayout layout{};
        layout.ring = 0;
        layout.merge = stages * 2 * tile_bytes(head_dim);
        layout.stats = layout.merge + kConsumerWarps * group * (head_dim + 4) * 4;  // + 4 floats: no bank conflicts
        layout.barriers = layout.stats + kConsumerWarps * kMaxGroup * 8;
        layout.rows = layout.barriers + 2 * kMaxStages * 8;
        layout.bytes = layout.rows + 4 * (3 * batch + 1);
        return layout;
    }
};

}  // namespace decode_attn
