// What the host tells the kernels, and every constant that host and device must agree on.
#pragma once
#include <cuda.h>

#include "gemm/gemm.h"

namespace gemm {

constexpr int kCluster = 2;  // blocks
constexpr int kMathGroups = 2, kThreads = (kMathGroups + 1) * 128;
constexpr int kStageColumns = 64;
constexpr int kUnitTokens = 64;                         // of one instruction of a warpgroup
constexpr int kTileTokens = kMathGroups * kUnitTokens;  // of a block's tile with a unit a warpgroup
constexpr int kBoxColumns = 64;                         // of a staging buffer: 64 tokens by 64 columns of out
constexpr int kBufferBytes = kUnitTokens * kBoxColumns * 2;
constexpr int kMinClaimedRounds = 4;  // of tiles for each cluster: in fewer, clusters do not drift apart
constexpr int kClaimSlots = 4;
constexpr int kMinClaimedSteps = 16;      // with fewer a slot could be written again before all have read it
constexpr int kBehindBytes = 1024 + 256;  // alignment, barriers and claims
constexpr int kMostBytes = 227 << 10;     // of shared memory

// Boxes of weight that make up a tile: as many as blocks bring them, or as parts of the inner dimension finish them.
constexpr int weight_boxes(int splits) {
    return splits > kCluster ? splits : kCluster;
}

// What a kernel is compiled for, and how it shares out shared memory.
template <Epilogue kEpilogue_, int kRows_, int kSplits_, int kTokens_ = kTileTokens>
struct Shape {
    static constexpr Epilogue kEpilogue = kEpilogue_;
    static constexpr int kRows = kRows_, kSplits = kSplits_;  // of weight in a tile; parts of the inner dimension
    static constexpr int kTokens = kTokens_, kUnits = kTokens / kTileTokens;  // of a block's tile; a warpgroup's
    static constexpr int kFragment = kRows / 2;                               // accumulators of a thread for a unit
    static constexpr int kXBytes = kTokens * kStageColumns * 2;
    static constexpr int kColumns = kRows / (kEpilogue == Epilogue::kSwiglu ? 2 : kSplits);  // of out, a part's
    static constexpr int kUnitBoxes = (kColumns + kBoxColumns - 1) / kBoxColumns;
    static constexpr int kBoxes = kUnits * kUnitBoxes;  // of a warpgroup
    static constexpr int kWeightBoxRows = kRows / weight_boxes(kSplits);
    static constexpr int kStageBytes = kXBytes + kRows * kStageColumns * 2;
    static constexpr int kRoom = kMostBytes - kBehindBytes;
    // Staging buffers of a warpgroup beside the ring. With a residual, those for all boxes of a unit hide the way there
    // and back.
    static constexpr int kBeside =
        kUnits == 1 && (kEpilogue == Epilogue::kResidual || kBoxes < 2) ? kBoxes : kUnits + 1;
    static constexpr int kStagesBeside = (kRoom - kMathGroups * kBeside * kBufferBytes) / kStageBytes;
    // Where a stage has room for a tile's output, and the ring for one more without buffers beside it, that stage of
    // the ring which comes behind the tile's last serves as its buffers.
    static constexpr int kTileBytes = kMathGroups * kBoxes * kBufferBytes;
    static constexpr bool kInRing = kTileBytes <= kStageBytes && kRoom / kStageBytes > kStagesBeside;
    static constexpr int kBuffers = kInRing ? 1 : kBeside;
    static constexpr int kStages = kInRing ? kRoom / kStageBytes : kStagesBeside;
    static constexpr int kRingBytes = kStages * kStageBytes;
    static constexpr int kBytes = kRingBytes + (kInRing ? 0 : kMathGroups * kBuffers * kBufferBytes);
    static constexpr int kSharedBytes = kBytes + kBehindBytes;
    static_assert(kWeightBoxRows % 8 == 0, "the swizzle repeats after 1024 bytes, 8 rows");
    static_assert(kColumns >= kBoxColumns && kColumns % 16 == 0);
    static_assert(kEpilogue != Epilogue::kResidual || kColumns % kBoxColumns == 0, "its boxes must not overlap");
    static_assert(kEpilogue != Epilogue::kSwiglu || kSplits == 1);
    static_assert(kTokens % kTileTokens == 0 && (kUnits == 1 || (kSplits == 1 && !kInRing)));
    static_assert(8 * 2 * (kStages + kMathGroups * kBuffers) + 12 * kClaimSlots <= 256, "room for barriers, claims");
};

struct TensorMaps {
    CUtensorMap x, weight, residual, out;  // boxes of kTokens, kWeightBoxRows, 64 and 64 rows by 64 columns
};

struct Tiling {
    int tiles_tokens, tiles_rows;  // in tiles of a cluster
    int steps;                     // of kStageColumns along the inner dimension
    int parts;                     // of all tiles: what the clusters share out
    bool claimed;                  // all but the first of each cluster; else a cluster takes every so many-th
};

// Where the parts of a tile leave sums for each other: a counter for each warp of each block, then the sums.
struct Exchange {
    unsigned* counters;
    float4* sums;
};

constexpr int kMathWarps = kMathGroups * 4;
constexpr int kMostClusters = 256;  // of a product in parts
constexpr int kCounterBytes = kMostClusters * kCluster * kMathWarps * 4;

// Of the sums that one cluster gets.
constexpr int exchange_bytes(int rows, int splits) {
    return (splits - 1) * (rows / splits) * kCluster * kTileTokens * 4;
}

}  // namespace gemm
