#include "skinny_linear/launch.h"

#include <algorithm>
#include <string>

#include "common/launch.h"
#include "common/require.h"
#include "common/tensor_map.h"

namespace skinny_linear {

template <int kTokenTiles>
const void* kernel_for(int grid, Form form);

namespace {

using common::require, common::require_aligned;

int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

int up(int bytes) {
    return divide_up(bytes, 128) * 128;
}

// Which WarpGrid serves a tile (instances.cuh), and what the host needs to know of it.
struct Shape {
    int grid, rows, boxes, column_warps;
    static Shape of(int tile_rows, int tokens) {
        if (tile_rows <= 16) return {0, 16, 4, 8};
        if (tile_rows <= 32) return {1, 32, 4, 8};
        if (tile_rows <= 64) return {2, 64, 2, tokens <= 16 ? 4 : 2};
        return {3, 128, 1, tokens <= 16 ? 2 : 1};
    }
};

// Tokens that the kernel for `num_tokens` takes, and the fewest rows of a tile for so many: else x outweighs weights.
int padded(int num_tokens) {
    int tokens = 8;
    while (tokens < num_tokens) tokens *= 2;
    return tokens;
}

int min_tile_rows(int tokens) {
    return tokens <= 16 ? 16 : 48;
}

const void* select_kernel(int tokens, int grid, Form form) {
    switch (tokens) {
        case 8:
            return kernel_for<1>(grid, form);
        case 16:
            return kernel_for<2>(grid, form);
        default:
            return kernel_for<4>(grid, form);
    }
}

SharedLayout lay_out(const Params& p, const Shape& shape, int tokens, Form form, bool one_tile) {
    const bool norm = has_norm(form);
    SharedLayout s{};
    s.stage_weight = shape.boxes * p.tile_rows * kPanelColumns * 2;
    s.stage = s.stage_weight + shape.boxes * tokens * kPanelColumns * 2;
    s.stride_partial = p.tile_rows + 4;  // so that a warp's store of partial sums meets every bank once
    const int ring = p.stages * s.stage, partials = shape.column_warps * tokens * s.stride_partial * 4;
    s.partials = one_tile ? 0 : ring;
    // Warps whose rows are not in the tile read on behind its last box.
    const int beyond = std::max(0, (shape.rows - p.tile_rows - shape.boxes * tokens) * kPanelColumns * 2);
    s.squares = up(one_tile ? std::max(ring + beyond, partials) : ring + partials);
    s.received = up(s.squares + (norm ? shape.column_warps * tokens * 4 : 0));
    const int received = p.splits * p.own_units * p.num_tokens * unit_rows(form) * 4;
    s.received_squares = s.received + (p.splits > 1 ? received : 0);
    s.barriers = up(s.received_squares + (p.splits > 1 && norm ? p.splits * p.num_tokens * 4 : 0));
    s.bytes = s.barriers + (2 * kMaxStages + 1) * 8;
    return s;
}

void check(const Problem& q, const Plan& t) {
    require(q.form == Form::kNormLinear || q.form == Form::kLinearAdd || q.form == Form::kNormSwiGlu,
            "form is " + std::to_string(int(q.form)) + "; supported here: norm_linear, linear_add, norm_swiglu");
    require(q.num_tokens >= 1 && q.num_tokens <= kMaxTokens,
            "num_tokens is " + std::to_string(q.num_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    require(q.size >= kPanelColumns && q.size % kPanelColumns == 0,
            "size is " + std::to_string(q.size) + "; expected a multiple of " + std::to_string(kPanelColumns));
    const int unit = unit_rows(q.form);
    require(q.num_rows >= unit && q.num_rows % unit == 0,
            "num_rows is " + std::to_string(q.num_rows) + "; expected a multiple of " + std::to_string(unit));
    const int tokens = padded(q.num_tokens), min_rows = min_tile_rows(tokens);
    require(t.tile_rows >= min_rows && t.tile_rows <= kMaxTileRows && t.tile_rows % 16 == 0,
            "tile_rows is " + std::to_string(t.tile_rows) + "; expected a multiple of 16 from " +
                std::to_string(min_rows) + " to " + std::to_string(kMaxTileRows));
    const int steps = divide_up(q.size / kPanelColumns, Shape::of(t.tile_rows, tokens).boxes);
    require(t.splits >= 1 && t.splits <= std::min(kMaxSplits, steps), "splits is " + std::to_string(t.splits) +
                                                                          "; supported here: 1 to " +
                                                                          std::to_string(std::min(kMaxSplits, steps)));
    require(t.ahead >= 0, "ahead is " + std::to_string(t.ahead) + "; expected 0 or more stages");
    require((q.form == Form::kLinearAdd) == (q.residual != nullptr),
            "a residual belongs to linear_add, and to no other");
    require_aligned(q.x, "x"), require_aligned(q.weight, "weight"), require_aligned(q.out, "out");
    require_aligned(q.residual, "residual");
}

}  // namespace

void launch(const Problem& q, const Plan& t, bool overlap, cudaStream_t stream) {
    check(q, t);
    const int tokens = padded(q.num_tokens);
    const Shape shape = Shape::of(t.tile_rows, tokens);

    Params p{};
    p.residual = q.residual, p.out = q.out;
    p.num_tokens = q.num_tokens, p.num_rows = q.num_rows, p.size = q.size, p.eps = q.eps;
    p.tile_rows = t.tile_rows, p.tiles = divide_up(q.num_rows, t.tile_rows), p.splits = t.splits;
    p.steps = divide_up(q.size / kPanelColumns, shape.boxes);
    p.own_units = divide_up(t.tile_rows / unit_rows(q.form), t.splits);
    while (1 << p.unit_bits < p.own_units) ++p.unit_bits;
    const auto fits = [&](bool one_tile) {
        p.layout = lay_out(p, shape, tokens, q.form, one_tile);
        return p.layout.bytes <= t.shared_bytes;
    };
    const auto require_room = [&](bool one_tile) {
        require(fits(one_tile), "a block needs " + std::to_string(p.layout.bytes) +
                                    " bytes of shared memory, and may have " + std::to_string(t.shared_bytes));
    };
    p.stages = 1;
    require_room(true);  // the least, before a GPU is asked for anything
    // A cluster that adds up partial sums has one tile; if not all run at once, the rest follow.
    const int clusters = t.splits > 1 || p.tiles <= 2 * common::multiprocessors() ? p.tiles : common::multiprocessors();
    const bool one_tile = clusters == p.tiles;
    p.stages = std::min(kMaxStages, divide_up(p.steps, t.splits) * divide_up(p.tiles, clusters));
    while (p.stages > 1 && !fits(one_tile)) --p.stages;
    require_room(one_tile);
    p.trigger = t.trigger, p.ahead = std::min(t.ahead, p.stages);

    const void* kernel = select_kernel(tokens, shape.grid, q.form);
    common::allow_shared_memory(kernel, common::shared_memory_limit(), true);
    CUtensorMap weight = common::panel_map(q.weight, q.num_rows, q.size, t.tile_rows, shape.boxes);
    CUtensorMap x = common::panel_map(q.x, q.num_tokens, q.size, tokens, shape.boxes);

    common::LaunchConfig config(dim3(clusters * t.splits), kThreads, p.layout.bytes, stream);
    void* arguments[] = {&weight, &x, &p};
    config.in_clusters(t.splits).overlapping(overlap).launch(kernel, arguments);
}

}  // namespace skinny_linear
