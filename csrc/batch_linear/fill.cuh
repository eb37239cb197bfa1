// The warp that fills the ring: boxes of weight, which may be asked for before the previous kernel has ended, and of x.
#pragma once
#include "batch_linear/finish.cuh"
#include "common/async.cuh"

namespace batch_linear {

using common::Cursor;

// Where in a matrix the next stage's box lies: the rows from `first` on of the block's, the columns from panel `panel`.
struct Position {
    int panel, first = 0;
    __device__ __forceinline__ void advance(const Params& p, int panels, int rows, bool many_tiles) {
        panel += panels;
        if (many_tiles && panel == p.steps * panels) panel = 0, first += rows;
    }
};

// One lane of the warp copies. begin() asks for constants only.
template <int kTokens, int kRows, Form kForm>
struct Producer {
    static constexpr int kPanels = stage_panels(kTokens, kRows), kXBytes = kPanels * panel_bytes(kTokens);
    static constexpr bool kManyTiles = makes_many_tiles(kForm);
    const Params& p;
    const Block& b;
    const CUtensorMap *weight, *x;
    const int ahead = min(p.ahead, b.steps), first = min(p.stages, b.steps), first_x = min(p.x_stages, b.steps);
    Position weight_at{b.first_step * kPanels}, x_at{b.first_step * kPanels};

    __device__ __forceinline__ void copy_weight(int stage) {
        if (common::elect_one()) {
            const uint32_t to = b.base + stage * p.weight_bytes, full = b.full(stage);
            const int row = b.first_row + weight_at.first;
            if constexpr (kManyTiles) {
                const int rows = min(b.rows - weight_at.first, kRows);
                common::mbarrier_expect(full, panel_bytes(rows) + kXBytes);
                for (int i = 0; i < rows; i += kBoxRows)
                    common::tma_load_panels(to + panel_bytes(i), weight, full, row + i, weight_at.panel,
                                            common::kEvictFirst);
            } else {
                common::mbarrier_expect(full, p.weight_bytes + kXBytes);
                common::tma_load_panels(to, weight, full, row, weight_at.panel, common::kEvictFirst);
            }
        }
        weight_at.advance(p, kPanels, kRows, kManyTiles);
    }
    // Its arrival counts for the stage of weight that it is multiplied with.
    __device__ __forceinline__ void copy_x(int x_stage, int stage) {
        if (common::elect_one())
            common::tma_load_panels(b.base + p.x_offset + x_stage * kXBytes, x, b.full(stage), 0, x_at.panel,
                                    common::kEvictLast);
        x_at.advance(p, kPanels, 0, kManyTiles);
    }
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int step = 0; step < ahead; ++step) copy_weight(step);
    }
    // The next kernel's weights should be on their way when this one's have been asked for: not before, because they
    // would only delay each other, and not after, because memory would rest.
    __device__ __forceinline__ void run() {
        common::wait_for_previous_kernel();
        if (b.steps - first <= p.trigger) common::allow_next_kernel();
#pragma unroll 1
        for (int step = 0; step < first; ++step) {
            if (step >= ahead) copy_weight(step);
            if (step < first_x) copy_x(step, step);
        }
        // What step `done` leaves behind takes the weight of one step and the x of another, sooner one.
        Cursor at, of_x;
        int x_with = p.x_stages % p.stages;
#pragma unroll 1
        for (int done = 0; done + p.x_stages < b.steps; ++done) {
            common::mbarrier_wait(b.empty(at.stage), at.phase);
            if (done + p.stages < b.steps) {
                copy_weight(at.stage);
                if (b.steps - done - p.stages - 1 == p.trigger) common::allow_next_kernel();
            }
            copy_x(of_x.stage, x_with);
            at.advance(p.stages), of_x.advance(p.x_stages);
            if (++x_with == p.stages) x_with = 0;
        }
    }
};

}  // namespace batch_linear
