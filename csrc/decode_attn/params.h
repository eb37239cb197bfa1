// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <cuda.h>

#include "common/kv_cache.h"
#include "common/types.cuh"

namespace decode_attn {

using common::kBlockSize;         // one (block, kv head) is one tile
constexpr int kMaxGroup = 8;      // query heads per kv head that one tensor-core tile holds
constexpr int kSliceTokens = 16;  // tokens that one warp takes of a tile
constexpr int kWarpsPerTile = kBlockSize / kSliceTokens;
constexpr int kBoxTokens = 16;  // that the copy engine brings at a time of a tile that is not full; a multiple of 8
constexpr int kTileGroups = 2;  // sets of warps that take alternate tiles
constexpr int kComputeWarps = kWarpsPerTile * kTileGroups;
constexpr int kComputeThreads = kComputeWarps * 32;
constexpr int kThreads = kComputeThreads + 2 * 32;  // and one warp that loads tiles, one that prepares queries
// A multiple of kTileGroups: so each stage always belongs to the same warps. A warp that met only every second phase of
// a barrier could not tell them apart by parity.
constexpr int kMaxStages = 8;
constexpr int max_stages(int head_dim) {
    return head_dim == 128 ? 4 : 6;
}  // measured: 96 to 128 KB in flight
// Pieces of work whose queries are ready, or asked for, before their turn. A GPU with 100 KB of shared memory has room
// for no more than four beside two stages of head size 128.
constexpr int query_slots(int head_dim) {
    return head_dim == 128 ? 4 : 8;
}
constexpr int kMaxQuerySlots = 8;
constexpr int kQueriesAhead = 4;              // of them, those whose inputs are on their way at a time
constexpr uint32_t kEmptyWord = 0xFFFFBEEFu;  // a word of a partial that nobody has published yet (merge.cuh)
constexpr int kStagedRowBytes =
    128;  // a tile lies in shared memory as panels of 64 columns: 64 rows of 128 bytes, swizzled

// Floats that one block publishes for a unit that another block finishes. For every 16 columns: four of O for each
// thread of a warp, and (max, sum) of two heads for each of four threads.
constexpr int kColumnsPartialFloats = 4 * (32 + 4);
constexpr int kPartialFloats = 128 / 16 * kColumnsPartialFloats;
// What a range has of the workspace: two such partials, which take turns launch by launch, and a RangeState
// (merge.cuh).
constexpr int kRangeFloats = 2 * kPartialFloats + 4;

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
    int blocks_per_slot;  // of the static cache; of a block table the columns
    int stages;           // tiles (K and V) that the ring in shared memory holds; a multiple of kTileGroups
    int min_tiles;        // a block gets at least this many tiles
    int stride_table_row;
    int group;         // num_heads / num_kv_heads
    float scale_log2;  // softmax scale * log2(e)
    const void* q;     // [batch, num_heads, head_dim]; fused: qkv [batch, (num_heads + 2 num_kv_heads) * head_dim]
    void* out;         // [batch, num_heads, head_dim]
    float* lse;        // [batch, num_heads] contiguous, natural logarithm; or null
    float* partials;   // [ranges, kRangeFloats], 16-byte aligned; see merge.cuh
    int ranges;        // at least one a block
    int64_t stride_q_row, stride_q_head, stride_out_row, stride_out_head;
    const float* cos;  // fused only: [positions, head_dim / 2]
    const float* sin;
    const void* k_cache;  // [num_blocks, num_kv_heads, 64, head_dim]
    const void* v_cache;
    int64_t stride_k_block, stride_k_head, stride_k_token, stride_v_block, stride_v_head, stride_v_token;
};

// A cache as a 5-D tensor (column, token, panel, kv head, block), in boxes of a tile, and of kBoxTokens by one panel.
struct CacheMaps {
    CUtensorMap tile, part;
};
struct TensorMaps {
    CacheMaps k, v;
};

// The part of a unit that lies in one block's range.
struct Piece {
    int row, head;  // of the unit
    int tiles;      // -1: there are no more pieces
    int tokens;     // of the unit, from the first of these tiles on
    int others;     // 0: the unit is all here; n > 0: finish it with what the next n ranges publish; -1: publish
    int buffer;     // which of a range's two partials is this launch's
};

// What the query warp hands to the others for one piece; before that, the inputs as they come from memory.
template <int kHeadDim>
struct QuerySlot {
    static constexpr int kCount = query_slots(kHeadDim);
    static constexpr int kRow = kHeadDim + 8;  // so that words of eight heads lie in different banks
    union {
        uint16_t q[kMaxGroup * kRow];        // a row a head
        uint2 fragments[kHeadDim / 16][32];  // Q^T as the tensor cores take it: 16 columns, one pair a lane
    };
    uint16_t new_value[kHeadDim];  // fused: of the new token
    float new_score[kMaxGroup];    // and its scaled score
    uint16_t new_key[kHeadDim];    // before rotation
    float cos[kHeadDim / 2], sin[kHeadDim / 2];
    Piece piece;
    int padding[2];
};
static_assert(sizeof(QuerySlot<64>) % 16 == 0 && sizeof(QuerySlot<128>) % 16 == 0);

// What the four warps of a tile tell each other.
struct TileExchange {
    float max[kWarpsPerTile][kMaxGroup];  // of a slice's scores
    uint4 weights[kBlockSize];            // of a token, for eight heads
};

// What the tile groups give each other at the end of a piece: O of 16 columns, and their states.
struct GroupExchange {
    float4 o[kComputeWarps][32];
    float4 state[kComputeWarps][4];
};

// Dynamic shared memory: barriers and exchange first, then what depends on the launch.
struct SharedLayout {
    static constexpr int kBarriers = 0;  // of the ring's stages, then of the slots
    static constexpr int kMergeBarriers = 8 * (4 * kMaxStages + 2 * kMaxQuerySlots);  // [kWarpsPerTile]
    static constexpr int kShareBarrier = kMergeBarriers + 8 * kWarpsPerTile;
    static constexpr int kShare = kShareBarrier + 16;  // aligned to 16 bytes
    static constexpr int kTileExchange = 512;          // [kTileGroups]
    static constexpr int kGroupExchange = 3072;        // [2]: pieces take turns
    static constexpr int kRing = 12 * 1024;            // a multiple of the swizzle's period
    int queries, rows, bytes;                          // offsets and the total

    __host__ __device__ static SharedLayout of(int head_dim, int batch, int stages) {
        SharedLayout layout{};
        layout.queries = kRing + stages * 2 * tile_bytes(head_dim);
        layout.rows = layout.queries +
                      query_slots(head_dim) * int(head_dim == 128 ? sizeof(QuerySlot<128>) : sizeof(QuerySlot<64>));
        layout.bytes = layout.rows + 4 * (3 * batch + 1);
        return layout;
    }
};
static_assert(kQueriesAhead <= query_slots(64) && kQueriesAhead <= query_slots(128));
static_assert(SharedLayout::kTileExchange + kTileGroups * sizeof(TileExchange) <= SharedLayout::kGroupExchange);
static_assert(SharedLayout::kGroupExchange + 2 * sizeof(GroupExchange) <= SharedLayout::kRing);

}  // namespace decode_attn
