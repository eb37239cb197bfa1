// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <cuda.h>

#include "common/types.cuh"

namespace decode_attn {

constexpr int kBlockSize = 64;    // tokens in a KV block; one (block, kv head) is one tile
constexpr int kMaxGroup = 8;      // query heads per kv head that one tensor-core tile holds
constexpr int kSliceTokens = 16;  // tokens that one warp takes of a tile
constexpr int kWarpsPerTile = kBlockSize / kSliceTokens;
constexpr int kTileGroups = 2;  // sets of warps that take alternate tiles
constexpr int kConsumerWarps = kWarpsPerTile * kTileGroups;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 32;  // and one warp that only loads
// A multiple of kTileGroups: so each stage always belongs to the same warps. A warp that met only every second phase of
// a barrier could not tell them apart by parity.
constexpr int kMaxStages = 12;
constexpr int max_stages(int head_dim) {
    return head_dim == 128 ? 4 : 6;
}  // measured: 96 to 128 KB in flight
constexpr uint32_t kEmptyWord = 0xFFFFBEEFu;  // a word of a partial that nobody has published yet (merge.cuh)
constexpr int kStagedRowBytes =
    128;  // a tile lies in shared memory as panels of 64 columns: 64 rows of 128 bytes, swizzled

// Floats that one block publishes for a unit that another block finishes: O [group][head_dim], then (max, sum) for
// every warp that will read it: one for each 64 columns of each head.
constexpr int kPartialFloats = kMaxGroup * (128 + 2 * 128 / 64);

// Floats between the heads of a warp's state in shared memory; 4 more than there are columns, to keep the banks apart.
__host__ __device__ constexpr int state_stride(int head_dim) {
    return head_dim + 4;
}

__host__ __device__ constexpr int tile_bytes(int head_dim) {
    return kBlockSize * head_dim * 2;
}

// All strides in elements. "Rows" are sequences of the batch; shapes are those of the Python operator. What the loading
// warp needs comes first: parameters live in constant memory, and the first touch of each 64 bytes costs a trip to L2
// or DRAM.
struct Params {
    const int* lengths;      // [batch] tokens in the cache: context_lens, or positions when fused (< 0: inactive row)
    const int* slots;        // [batch] row -> slot of the static cache; null: row i is slot i
    const int* block_table;  // [batch, ...] or null: block t of a row is slot * blocks_per_slot + t
    int batch, num_kv_heads;
    int blocks_per_slot;
    int stages;     // tiles (K and V) that the ring in shared memory holds; a multiple of kTileGroups
    int min_tiles;  // a block gets at least this many tiles
    int stride_table_row;
    int group;         // num_heads / num_kv_heads
    float scale_log2;  // softmax scale * log2(e)
    const void* q;     // [batch, num_heads, head_dim]; fused: qkv [batch, (num_heads + 2 num_kv_heads) * head_dim]
    void* out;         // [batch, num_heads, head_dim]
    float* lse;        // [batch, num_heads] contiguous, natural logarithm; or null
    float* partials;   // [grid, kPartialFloats], every word kEmptyWord between launches
    int64_t stride_q_row, stride_q_head, stride_out_row, stride_out_head;
    const float* cos;  // fused only: [positions, head_dim / 2]
    const float* sin;
    const void* k_cache;  // [num_blocks, num_kv_heads, 64, head_dim]
    const void* v_cache;
    int64_t stride_k_block, stride_k_head, stride_k_token, stride_v_block, stride_v_head, stride_v_token;
};

// Both caches as 5-D tensors (column, token, panel, kv head, block).
struct TensorMaps {
    CUtensorMap k, v;
};

// Dynamic shared memory: barriers and softmax statistics in the first kilobyte, then what depends on the launch.
struct SharedLayout {
    static constexpr int kBarriers = 0;  // full [kMaxStages], empty [kMaxStages]
    static constexpr int kStats = 2 * kMaxStages * 8;
    static constexpr int kRing = 1024;  // a multiple of the swizzle's period
    int states, rows, bytes;            // offsets and the total

    __host__ __device__ static SharedLayout of(int head_dim, int group, int batch, int stages) {
        SharedLayout layout{};
        layout.states = kRing + stages * 2 * tile_bytes(head_dim);
        layout.rows = layout.states + kConsumerWarps * group * state_stride(head_dim) * 4;
        layout.bytes = layout.rows + 4 * (3 * batch + 1);
        return layout;
    }
};
static_assert(SharedLayout::kStats + kConsumerWarps * kMaxGroup * 8 <= SharedLayout::kRing);

}  // namespace decode_attn
