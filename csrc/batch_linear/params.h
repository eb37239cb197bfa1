// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <cstdint>

#include "common/linear.h"

namespace batch_linear {

constexpr int kMaxTokens = 128;
constexpr int kUnitRows = 16;                           // rows whose sums one warp holds
constexpr int kConsumerWarps = 8;                       // two warpgroups
constexpr int kMinTileRows = 64;                        // one instruction's
constexpr int kShortRows = kConsumerWarps * kUnitRows;  // of a tile, a unit a warp
constexpr int kTallRows = 2 * kShortRows;               // the most, two units a warp
constexpr int kStageColumns = 64;                       // 128 bytes, the swizzle's width
constexpr int kMaxSplits = 8;                           // blocks of a cluster, the portable limit
constexpr int kMaxStages = 14;
constexpr int kScaleWarps = 4;  // sum up squares where there is a norm
constexpr int kConsumers = kConsumerWarps * 32, kScaleThreads = kScaleWarps * 32;

using common::Form, common::has_norm;

// Threads of a block: those that multiply, the warp that copies, and with a norm those that make its scales.
constexpr int threads(Form form) {
    return kConsumers + 32 + (has_norm(form) ? kScaleThreads : 0);
}

// Rows of weight that make an output: SwiGLU's gates and ups alternate in groups of 8.
constexpr int rows_per_output(Form form) {
    return form == Form::kNormSwiGlu ? 2 : 1;
}

// Tokens that a kernel is compiled for; others run in the next larger one.
constexpr int kTokenCounts[] = {32, 48, 64, 96, 128};

// Whether tiles may have more than kShortRows: only SwiGLU's products have so many rows that it pays.
constexpr bool may_be_tall(Form form, int tokens) {
    return form == Form::kNormSwiGlu && tokens <= 64;
}

constexpr int padded_tokens(int tokens) {
    for (const int count : kTokenCounts)
        if (tokens <= count) return count;
    return 0;
}

// Of `count` things that a cluster shares out, block `rank` has those from first_of(rank) to first_of(rank + 1): steps
// to multiply, and units of the tile to finish.
constexpr __host__ __device__ int first_of(int count, int rank, int splits) {
    return count * rank / splits;
}
constexpr __host__ __device__ int owner_of(int unit, int units, int splits) {
    return ((unit + 1) * splits - 1) / units;
}

// RMSNorm of h [num_tokens, n] in two parts, which the product that makes h leaves: weighted [num_tokens, n], h times
// the norm's weight, and squares [count, num_tokens], whose sum over `count` is that of a token's squares. The product
// that wants the norm multiplies `weighted`, and each token's sums by rsqrt(its squares / n + eps).
struct NormParts {
    void* weighted;
    float* squares;
    int count;
};

struct Params {
    const void* residual;   // [num_tokens, num_rows] or null
    void* out;              // [num_tokens, num_rows], SwiGLU: [num_tokens, num_rows / 2]
    const void* next_norm;  // [num_rows] or null: linear_add leaves `parts` for the norm that follows
    NormParts parts;        // linear_add's have a sum for each unit of its rows
    int num_tokens, num_rows, size;
    float eps;
    int tile_rows, units;       // weight rows of a tile, and units of them
    int splits, stages, steps;  // steps: of kStageColumns, over all splits
    int ahead;                  // stages of weight that are asked for before the previous kernel has ended
    int trigger;                // the next kernel may start when this many stages are left to ask for
    int tail_offset;            // in shared memory
};

// Shared memory of a block. At its start lies the ring of stages, weight before x, then Tail.
constexpr __host__ __device__ int row_bytes(int rows) {
    return rows * kStageColumns * 2;
}
constexpr __host__ __device__ int stage_bytes(int tile_rows, int tokens) {
    return row_bytes(tile_rows + tokens);
}

// What the blocks of a cluster send the one that finishes a unit of rows: fragments of float4 a lane, [source][own
// unit][tokens / 8][32 lanes]. They go to the stages that the receiver has done with first, so many units to each.
constexpr __host__ __device__ int unit_bytes(int tokens) {
    return tokens * kUnitRows * 4;
}
constexpr __host__ __device__ int units_per_stage(int tile_rows, int tokens) {
    return stage_bytes(tile_rows, tokens) / unit_bytes(tokens);
}
constexpr __host__ __device__ int receiving_stages(int tile_rows, int tokens, int splits, int own_units) {
    const int per_stage = units_per_stage(tile_rows, tokens);
    return (splits * own_units + per_stage - 1) / per_stage;
}

struct Tail {
    float squares[kScaleThreads];  // of a token, over a part of their `count`
    float scale[kMaxTokens];
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t drained, received;
};

}  // namespace batch_linear
