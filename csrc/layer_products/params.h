// What the host tells the kernel, and every constant that host and device must agree on.
#pragma once
#include <cstdint>

#include "common/linear.h"

namespace layer_products {

using common::Form, common::has_norm;

constexpr int kMaxProducts = 4;
constexpr int kTileRows = 128;  // weight rows of a tile, 64 for each of two warpgroups
constexpr int kUnitRows = 16;   // rows whose sums one warp holds
constexpr int kUnits = kTileRows / kUnitRows;
constexpr int kStageColumns = 64;  // 128 bytes, the swizzle's width
constexpr int kMaxStages = 12;
constexpr int kMinSteps = 4;  // of a block: what takes part costs an exchange
constexpr int kConsumerWarps = kUnits;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kScaleThreads = 2 * 32;                          // that find scales
constexpr int kThreads = kConsumers + 2 * 32 + kScaleThreads;  // and a warp each that copies weights and tokens
constexpr int kFinishBarrier = 1, kScaleBarrier = 2;

// Tokens that a kernel is compiled for; others run in the next larger one.
constexpr int kTokenCounts[] = {16, 32, 64, 128};
constexpr int kMaxTokens = 128;

constexpr int padded_tokens(int tokens) {
    for (const int count : kTokenCounts)
        if (tokens <= count) return count;
    return 0;
}

constexpr int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

// One product: [num_tokens, size] times weight [num_rows, size]. Pointers are to bf16 but for the squares.
struct Product {
    const void* residual;  // [num_tokens, num_rows], linear_add only
    const void* norm;      // [num_rows] or null, linear_add only: of the product that follows
    void* out;             // [num_tokens, num_rows], SwiGLU: [num_tokens, num_rows / 2]
    void* normed;          // out times norm, as the next product takes it; [num_tokens, num_rows]
    float* squares;        // [rows / 16][tokens], sums over 16 rows of out: written with `normed`, else read
    Form form;
    int num_rows, size;
    int tiles, steps;  // of kTileRows; of kStageColumns
    int blocks;        // that share it
};

struct Params {
    Product products[kMaxProducts];
    int count, num_tokens, stages;
    int trigger;  // the next kernel may start when the last product has so many steps left to ask for
    int ahead_start, ahead;
    float eps;
    uint32_t* words;  // see Words
    float4* sums;     // [blocks][2][kUnits][tokens / 8][32 lanes], empty between launches
    long long* clocks;
};

// In `words`. A launch starts with what the one before has left, and needs no clearing.
struct Words {
    static constexpr int kArrived = 0;  // blocks that have finished a product, over all launches
    static constexpr int kBase = 32;    // what that was at the start of the launch
    static constexpr int kCount = 64;
};

constexpr __host__ __device__ int unit_floats4(int tokens) {
    return tokens / 8 * 32;
}

// Shared memory of a block: the ring of stages, weight before tokens, then Tail.
constexpr __host__ __device__ int stage_bytes(int tokens) {
    return (kTileRows + tokens) * kStageColumns * 2;
}

struct Tail {
    float squares[kScaleThreads * 4];  // [parts][tokens]
    float scale[kMaxTokens];
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t ready;  // the tokens of a product are, and the squares; a phase for each product that needs scales
    uint64_t finished;
    uint64_t scaled;  // the scales are there; likewise
};

// The list of a product's steps, ordered by (tile, column), is cut into equal ranges, one a block. What a block has of
// a tile is a *piece*. Of the tiles that are cut, each block that has a piece finishes some units of 16 rows.
struct Range {
    int begin, end;
    static constexpr __host__ __device__ Range of(int total, int block, int blocks) {
        return {int(int64_t(total) * block / blocks), int(int64_t(total) * (block + 1) / blocks)};
    }
    // The block in whose range a step lies; ranges are not empty.
    static constexpr __host__ __device__ int block_of(int step, int total, int blocks) {
        return int((int64_t(step + 1) * blocks - 1) / total);
    }
};

// A range tile by tile. Blocks of odd number go backwards, so that two neighbours begin with the tile that they share,
// or end with it.
struct Pieces {
    Range range;
    int steps;
    bool backwards;
    int begin, end;  // of the current piece

    constexpr __host__ __device__ Pieces(Range range, int steps, int block)
        : range(range), steps(steps), backwards(block % 2), begin(0), end(0) {
        first();
    }
    constexpr __host__ __device__ void first() {
        begin = backwards ? start_of(range.end - 1) : range.begin;
        end = backwards ? range.end : end_of(range.begin);
    }
    // False: that was the last one.
    constexpr __host__ __device__ bool next() {
        if (backwards ? begin == range.begin : end == range.end) return false;
        if (backwards)
            end = begin, begin = start_of(end - 1);
        else
            begin = end, end = end_of(begin);
        return true;
    }
    constexpr __host__ __device__ int tile() const { return begin / steps; }
    constexpr __host__ __device__ bool is_whole() const { return end - begin == steps; }

  private:
    constexpr __host__ __device__ int start_of(int step) const {
        const int start = step / steps * steps;
        return start > range.begin ? start : range.begin;
    }
    constexpr __host__ __device__ int end_of(int step) const {
        const int end = (step / steps + 1) * steps;
        return end < range.end ? end : range.end;
    }
};

// The blocks that share a tile, `count` from `first` on, and who finishes which units.
struct Sharers {
    int first, count;
    static constexpr __host__ __device__ Sharers of(int tile, int steps, int total, int blocks) {
        const int first = Range::block_of(tile * steps, total, blocks);
        return {first, Range::block_of((tile + 1) * steps - 1, total, blocks) - first + 1};
    }
    constexpr __host__ __device__ int first_unit(int rank) const {
        const int finishers = count < kUnits ? count : kUnits;
        return rank >= finishers ? kUnits : (rank * kUnits + finishers - 1) / finishers;
    }
};

}  // namespace layer_products
