// What the persistent decode step is told, and how its work is cut: read by the host and by the device.
//
// H hidden size, F intermediate size, Hq and Hkv query and kv heads of size D, V vocabulary. All matrices are bf16,
// row-major [rows, k] and contiguous, so that a range of rows is one run of memory.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace decode_step {

using bf16 = __nv_bfloat16;

constexpr int kMathWarps = 8;
constexpr int kMathThreads = kMathWarps * 32;
constexpr int kEpilogueWarp = kMathWarps;        // sums the math warps' partial rows and publishes them
constexpr int kLoaderWarp = kMathWarps + 1;      // streams weights and cached keys and values
constexpr int kThreads = (kMathWarps + 4) * 32;  // two warps idle: registers move between groups of four warps

constexpr int kTileTokens = 64;                  // one cache block of one head is one tile
constexpr int kUnit = 256;                       // columns that a warp reads of a row with one 16-byte load a lane
constexpr int kUnitChoices[] = {1, 2, 3, 4, 7};  // units of a row that one warp may own: its slice of x is in registers
constexpr int kBatchRows = 16;                   // rows that a warp sums across its lanes at once
constexpr int kBatchBuffers = 3;                 // batches of partial rows in flight between math warps and epilogue
constexpr int kSlotBytes = 32 * 1024;            // of the ring: a chunk or less
constexpr int kMaxSlots = 8;
constexpr int kMaxSplits = 16;      // context splits of one kv head
constexpr int kMaxGroup = 8;        // query heads of one kv head
constexpr int kMaxHeadRows = 1024;  // of the vocabulary, a block
constexpr int kBallotWords = 7, kBallotStride = 8;

enum Op { kQkv = 0, kO = 1, kGateUp = 2, kDown = 3, kHead = 4, kNumOps = 5 };

// The other projections scale their results by the norm of x: an RMSNorm comes before them.
__host__ __device__ constexpr bool adds_residual(int op) {
    return op == kO || op == kDown;
}

struct LayerPointers {
    const bf16 *attn_norm, *qkv, *o, *mlp_norm, *gate_up, *down;
};

// One projection y = W x, W [rows, k]. A chunk is `chunk_rows` whole rows; in it, k_slices warps share a row, each with
// `units` units of columns, and the 8 / k_slices groups of warps take different rows.
struct Linear {
    int rows, k;
    int row_unit;  // rows are dealt to blocks in multiples of this
    int units, k_slices, chunk_rows, chunk_bytes;
    int row_bits, group_bits;  // log2 of rows_per_warp(units) and of 8 / k_slices
};

// Rows of a chunk that one warp multiplies: kChunkLoads loads of 16 bytes a lane, where rows are short enough.
constexpr int kChunkLoads = 8;
__host__ __device__ constexpr int rows_per_warp(int units) {
    return units == 1 ? kChunkLoads : units == 2 ? kChunkLoads / 2 : units <= 4 ? kChunkLoads / 4 : 1;
}

struct Params {
    const LayerPointers* layers;               // [num_layers], device memory
    const bf16 *embed, *final_norm, *lm_head;  // [V, H], [H], [V, H]
    const float *cos, *sin;                    // [max_position, D / 2]
    bf16 *k_cache, *v_cache;                   // [num_layers, num_blocks, Hkv, 64, D]
    int64_t stride_cache_layer;                // elements
    int blocks_per_slot, max_positions;        // max_positions: the smaller of the slot's and the table's length
    int num_layers, hidden_size, num_heads, num_kv_heads, vocab_size;
    int group;                               // query heads of one kv head
    float rms_norm_eps, softmax_scale_log2;  // log2(e) / sqrt(D)
    Linear linear[kNumOps];
    int num_slots, max_streaming, max_exchanging, exchange_chunks, max_splits, single_split_tiles;

    // Decode state of the one row: where the step reads its input and leaves its output.
    int64_t* token_id;                                   // [1]
    int32_t* position;                                   // [1], index of the new token; negative: idle, nothing happens
    const int32_t* slot;                                 // [1]
    const int64_t* stop_ids;                             // [num_stop_ids], negative entries never match; may be null
    const int32_t *first_stop_position, *last_position;  // [1]; null without stop_ids
    int num_stop_ids;
    const float* temperature;                // [1], 0 is greedy; null: greedy
    const float *top_p, *min_p;              // [1] each
    const int64_t* top_k;                    // [1], 0: no limit; has no effect beside a top_p below 1
    const int64_t *seed, *request, *sample;  // [1] each, the generator's key
    int num_steps;                           // tokens that one launch decodes
    bool draws;                              // false: logits only; state stays as it is and num_steps is 1
    float* logits;                           // [V] of the last step, or null
    int64_t* drawn;                          // [num_steps], the tokens drawn; null if !draws

    // What is on its way between blocks (packet.cuh). Zeroed once, with `steps_done`; then never again.
    uint32_t *x_attn, *x_mlp, *qkv, *attn, *act;  // tagged words: [H], [H], [(Hq + 2 Hkv) D], [Hq D], [F]
    uint64_t* split_out;                          // [Hkv, max_splits, group D] pairs (value, tag)
    uint64_t* split_state;                        // [Hkv, max_splits, group, 2] pairs (max or sum, tag)
    uint64_t* ballots;                            // [2, grid, 8] pairs (word, tag), see draw.cuh
    uint32_t* steps_done;                         // [2], all steps and rounds of drawing ever; tags derive from them
    int64_t* profile;                             // [grid, 32] cycles, in builds with DECODE_STEP_PROFILE
};

struct Rows {
    int begin, count;
};

// The rows of one projection that a block multiplies. The remainder moves around with the layer, so that over a step
// every block reads nearly the same number of bytes.
__host__ __device__ inline Rows rows_of_block(const Linear& linear, int op, int layer, int block, int grid) {
    const int pieces = linear.rows / linear.row_unit;
    const int seat = (block + layer * 37 + op * 29) % grid;
    const int begin = static_cast<uint32_t>(seat) * pieces / grid,
              end = static_cast<uint32_t>(seat + 1) * pieces / grid;
    return {begin * linear.row_unit, (end - begin) * linear.row_unit};
}

// The tokens that a block attends to, the new one among them: tiles [tile_begin, tile_end) of one kv head; head < 0:
// none.
struct AttentionWork {
    int head, split, num_splits, tile_begin, tile_end;
};

__host__ __device__ inline AttentionWork attention_of_block(const Params& p, int position, int block) {
    const int tiles = position / kTileTokens + 1;
    int split_bits = 0;
    if (tiles > p.single_split_tiles)
        while (1 << split_bits < p.max_splits && 4 << split_bits <= tiles) ++split_bits;  // two tiles a split, or more
    const int splits = 1 << split_bits, head = block >> split_bits, split = block & (splits - 1);
    // The same blocks in every layer: they keep the instructions of this part in their cache.
    if (head >= p.num_kv_heads) return {-1, 0, splits, 0, 0};
    return {head, split, splits, split * tiles >> split_bits, (split + 1) * tiles >> split_bits};
}

// How the columns of a row of length k are dealt to warps; units 0 if that cannot be done.
inline Linear make_linear(int rows, int k, int row_unit) {
    Linear linear{rows, k, row_unit, 0, 0, 0, 0, 0, 0};
    if (k % kUnit != 0) return linear;
    for (int slices = kMathWarps; slices > 0 && linear.units == 0; slices /= 2)
        for (int units : kUnitChoices)
            if (units * slices * kUnit == k) {
                linear.units = units;
                linear.k_slices = slices;
                linear.chunk_rows = rows_per_warp(units) * (kMathWarps / slices);
                linear.chunk_bytes = linear.chunk_rows * k * 2;
                while (1 << linear.row_bits < rows_per_warp(units)) ++linear.row_bits;
                while (slices << linear.group_bits < kMathWarps) ++linear.group_bits;
            }
    return linear;
}

// Launches params.num_steps steps on `stream` with all the shared memory that a block may have; throws
// std::runtime_error on a CUDA error.
void launch(Params params, int head_dim, int grid, int max_smem_bytes, void* stream);
// Shared memory of one block besides the ring.
int fixed_smem_bytes(int num_layers, int head_dim, int group);

}  // namespace decode_step
