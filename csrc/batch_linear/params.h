// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <array>
#include <cstdint>

#include "common/linear.h"

namespace batch_linear {

constexpr int kMaxTokens = 128;
constexpr int kConsumerWarps = 8;                // two warpgroups
constexpr int kUnitRows = 16, kPartTokens = 16;  // of weight and of tokens, a fragment's
constexpr int kShortRows = 128;                  // of weight: two warpgroups' instructions, where weights are rows
constexpr int kBoxRows = 32;   // that a block of many tiles brings at a time, and that its share is made of
constexpr int kMaxSplits = 8;  // blocks of a cluster, the portable limit
constexpr int kMaxStages = 24;
constexpr int kScaleWarps = 4;  // sum up squares where there is a norm
constexpr int kConsumers = kConsumerWarps * 32, kScaleThreads = kScaleWarps * 32;

using common::Form, common::has_norm, common::kPanelColumns, common::Squares;

// Threads of a block: those that multiply, the warp that copies, and with a norm those that make its scales.
constexpr int threads(Form form) {
    return kConsumers + 32 + (has_norm(form) ? kScaleThreads : 0);
}

// Rows of weight that make an output: SwiGLU's gates and ups alternate in groups of 8.
constexpr int rows_per_output(Form form) {
    return form == Form::kNormSwiGlu ? 2 : 1;
}

// Tokens that a kernel is compiled for; others run in the next larger one.
constexpr int kTokenCounts[] = {16, 32, 48, 64, 96, 128};

constexpr int padded_tokens(int tokens) {
    for (const int count : kTokenCounts)
        if (tokens <= count) return count;
    return 0;
}

// Whether tokens are the tensor cores' rows and weights their columns, or the other way round. An instruction has 64
// rows, and what it multiplies in vain costs power, so tokens are rows where there are as many; and then it takes as
// many rows of weight as a tile has, and brings the tokens less often from shared memory.
constexpr bool tokens_are_rows(int tokens) {
    return tokens == 64;
}

// Whether every block makes several tiles, one after the other, and its ring runs on over their borders.
constexpr bool makes_many_tiles(Form form) {
    return form == Form::kLinear;
}

// Only SwiGLU's products and the head have so many rows that tiles of more than kShortRows pay.
constexpr bool may_be_tall(Form form, int tokens) {
    return (form == Form::kNormSwiGlu || makes_many_tiles(form)) && tokens <= 64;
}

constexpr int lowest_tile(int tokens) {
    return tokens_are_rows(tokens) ? 32 : 64;
}
constexpr int tallest_tile(Form form, int tokens) {
    return may_be_tall(form, tokens) ? 2 * kShortRows : kShortRows;
}

// Panels of 64 columns that make a stage, in the kernel for tiles of `rows`. Waits and addresses of a stage take as
// long as the multiplications of a low panel, and longer than it takes to arrive.
constexpr int stage_panels(int tokens, int rows) {
    return tokens <= 64 && rows <= 64 ? 2 : 1;
}

// Heights of tiles that kernels are compiled for, in ascending order; a tile between two runs in the taller one's.
template <Form kForm, int kTokens>
constexpr auto tile_heights() {
    if constexpr (makes_many_tiles(kForm)) {
        return std::array{tallest_tile(kForm, kTokens)};
    } else if constexpr (!tokens_are_rows(kTokens)) {
        if constexpr (may_be_tall(kForm, kTokens))
            return std::array{kShortRows, 2 * kShortRows};
        else if constexpr (kTokens <= 64)
            return std::array{64, kShortRows};
        else
            return std::array{kShortRows};
    } else {
        if constexpr (may_be_tall(kForm, kTokens))
            return std::array{kShortRows, 224, 256};
        else
            return std::array{32, 64, kShortRows};
    }
}

// Of `count` things that a cluster shares out, block `rank` has those from first_of(rank) to first_of(rank + 1): steps
// to multiply, and units of the tile to finish.
constexpr __host__ __device__ int first_of(int count, int rank, int splits) {
    return count * rank / splits;
}
constexpr __host__ __device__ int owner_of(int unit, int units, int splits) {
    return ((unit + 1) * splits - 1) / units;
}

struct Params {
    const void* residual;  // [num_tokens, num_rows] or null
    void* out;             // [num_tokens, num_rows], SwiGLU: [num_tokens, num_rows / 2]
    Squares squares;       // linear_add's have a sum for each unit of its rows
    int num_tokens, num_rows, size;
    float eps;
    int tile_rows, units;  // weight rows of a tile, and units of them
    int splits;
    int stages;                 // of the ring
    int x_stages;               // of x, which is nearer than memory: no more than of weight
    int steps;                  // a stage's columns each, over all splits
    int weight_bytes;           // of a stage
    int ahead;                  // stages of weight that are asked for before the previous kernel has ended
    int trigger;                // the next kernel may start when this many stages are left to ask for
    int x_offset, tail_offset;  // in shared memory
};

// What the host launches: `rows` of weight are read of every tile, also where it has fewer.
struct Kernel {
    const void* function;
    int rows;
};

// Shared memory of a block: the weight of all stages, x of x_stages, Tail.
constexpr __host__ __device__ int panel_bytes(int rows) {
    return rows * kPanelColumns * 2;
}

// What the blocks of a cluster send the one that finishes a unit of rows: fragments of eight floats a lane, [source]
// [own unit][part][2][32 lanes] of float4. They go where weight lay, from the stage on that the receiver has done with
// first; what exceeds all stages, where x lay.
constexpr int kFragmentBytes = kPartTokens * kUnitRows * 4;
constexpr __host__ __device__ int unit_bytes(int tokens) {
    return tokens / kPartTokens * kFragmentBytes;
}
constexpr __host__ __device__ int received_bytes(int tokens, int splits, int own_units) {
    return splits * own_units * unit_bytes(tokens);
}

struct Tail {
    float squares[kScaleThreads];  // of a token, over a part of their `count`
    float scale[kMaxTokens];
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t drained, received;
};

}  // namespace batch_linear
