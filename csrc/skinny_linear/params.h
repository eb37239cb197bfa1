// What the host tells the kernel, and where things lie in a block's shared memory: one definition for both sides.
#pragma once
#include <cstdint>

#include "common/linear.h"

namespace skinny_linear {

constexpr int kMaxTokens = 32;
constexpr int kMaxTileRows = 128;
constexpr int kMaxSplits = 8;  // blocks of a cluster, the portable limit
constexpr int kMaxStages = 16;
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kThreads = kConsumers + 32;  // and the warp that copies

using common::Form, common::has_norm, common::kPanelColumns;

// Rows of weight that make 16 bytes of output.
constexpr int unit_rows(Form form) {
    return form == Form::kNormSwiGlu ? 16 : 8;
}

// How the eight consumer warps share a stage: kRowWarps groups of kRowTiles 16-row tiles times kTokenWarps groups of
// tokens, the rest over columns, 32 * kChunks of them a warp. A stage has kBoxes boxes.
template <int kRowTiles_, int kRowWarps_, int kTokenWarps_ = 1, int kChunks_ = 1>
struct WarpGrid {
    static constexpr int kRowTiles = kRowTiles_, kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_, kChunks = kChunks_;
    static constexpr int kColumnWarps = kConsumerWarps / (kRowWarps * kTokenWarps), kBoxes = kColumnWarps * kChunks / 2;
    static_assert(kBoxes * 2 == kColumnWarps * kChunks);
};

// Offsets in bytes. The ring comes first; the warps' partial sums follow, or lie over the ring if no tile comes after
// the first; then what the cluster's blocks send one another, and the barriers.
struct SharedLayout {
    int stage_weight, stage;  // bytes of weight in a stage, and of all of it
    int partials, squares, received, received_squares, barriers, bytes;
    int stride_partial;  // between tokens, in floats
};

struct Params {
    const void* residual;  // [num_tokens, num_rows] or null
    void* out;             // [num_tokens, num_rows], SwiGLU: [num_tokens, num_rows / 2]
    int num_tokens, num_rows, size;
    float eps;
    int tile_rows, tiles, splits, stages, steps;  // steps: stages' worth of columns, over all splits
    int own_units, unit_bits;                     // see Item; 1 << unit_bits is at least own_units
    int ahead;    // stages of weight that are asked for before the previous kernel has ended
    int trigger;  // the next kernel may start when this many stages are left to ask for
    SharedLayout layout;
};

}  // namespace skinny_linear
