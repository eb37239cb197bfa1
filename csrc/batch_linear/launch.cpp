#include "batch_linear/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/require.h"
#include "common/tensor_map.h"

namespace batch_linear {

template <Form kForm>
Kernel kernel_for(int tokens, int tile_rows);

namespace {

using common::require, common::require_aligned;

int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

void check_squares(const Problem& q, const Squares& squares) {
    const std::string found = "there are " + std::to_string(squares.count) + " sums of squares a token; expected ";
    if (has_norm(q.form)) {
        require(squares.sums && squares.count >= 1, found + "1 or more, of x");
    } else {
        const int count = q.form == Form::kLinearAdd && squares.sums ? q.num_rows / kUnitRows : 0;
        require(squares.count == count, found + std::to_string(count) + ", of out");
    }
}

void check(const Problem& q, const Squares& squares, const Plan& plan) {
    require(q.num_tokens >= 1 && q.num_tokens <= kMaxTokens,
            "num_tokens is " + std::to_string(q.num_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    require(q.size >= kPanelColumns && q.size % kPanelColumns == 0,
            "size is " + std::to_string(q.size) + "; expected a multiple of " + std::to_string(kPanelColumns));
    require(q.num_rows >= kUnitRows && q.num_rows % kUnitRows == 0,
            "num_rows is " + std::to_string(q.num_rows) + "; expected a multiple of " + std::to_string(kUnitRows));
    const int tallest = tallest_tile(q.form, padded_tokens(q.num_tokens));
    const int lowest = makes_many_tiles(q.form) ? tallest : lowest_tile(padded_tokens(q.num_tokens));
    require(plan.tile_rows >= lowest && plan.tile_rows <= tallest && plan.tile_rows % kUnitRows == 0,
            "tile_rows is " + std::to_string(plan.tile_rows) + "; supported here: multiples of " +
                std::to_string(kUnitRows) + " from " + std::to_string(lowest) + " to " + std::to_string(tallest));
    require(plan.ahead >= 0, "ahead is " + std::to_string(plan.ahead) + "; expected 0 or more stages");
    require((q.form == Form::kLinearAdd) == (q.residual != nullptr),
            "a residual belongs to linear_add, and to no other");
    check_squares(q, squares);
    const struct {
        const char* name;
        const void* pointer;
    } operands[] = {
        {"x", q.x}, {"weight", q.weight}, {"out", q.out}, {"residual", q.residual}, {"squares", squares.sums}};
    for (const auto& operand : operands) require_aligned(operand.pointer, operand.name);
}

Kernel select_kernel(Form form, int tokens, int tile_rows) {
    switch (form) {
        case Form::kNormLinear:
            return kernel_for<Form::kNormLinear>(tokens, tile_rows);
        case Form::kLinearAdd:
            return kernel_for<Form::kLinearAdd>(tokens, tile_rows);
        case Form::kNormSwiGlu:
            return kernel_for<Form::kNormSwiGlu>(tokens, tile_rows);
        case Form::kLinear:
            return kernel_for<Form::kLinear>(tokens, tile_rows);
    }
    throw std::invalid_argument("unknown form");
}

// Shares out what a block may use, and returns how much of it is used.
int lay_out(Params& p, const Plan& plan, int kernel_rows, int panels, int tokens, int block_steps) {
    p.weight_bytes = panels * panel_bytes(p.tile_rows);
    const int x_bytes = panels * panel_bytes(tokens);
    // What is read behind a tile that is not so high has to be there behind the last stage as well.
    const int behind = std::max(int(sizeof(Tail)), panel_bytes(kernel_rows - p.tile_rows - tokens));
    const int received = p.splits == 1 ? 0 : received_bytes(tokens, p.splits, divide_up(p.units, p.splits));
    const int least = std::min(2, block_steps), most = std::min(kMaxStages, block_steps);
    const int room = plan.shared_bytes - behind;
    p.x_stages = std::min({plan.x_stages, most, room / (p.weight_bytes + x_bytes)});
    p.stages = std::min(most, (room - p.x_stages * x_bytes) / p.weight_bytes);
    p.ahead = std::min(plan.ahead, p.stages);
    p.x_offset = p.stages * p.weight_bytes, p.tail_offset = p.x_offset + p.x_stages * x_bytes;
    require(plan.x_stages >= least,
            "x_stages is " + std::to_string(plan.x_stages) + "; expected " + std::to_string(least) + " or more");
    const int stages = std::max(least, divide_up(received, p.weight_bytes + x_bytes));
    require(p.x_stages >= least && p.tail_offset >= received,
            "a block needs " + std::to_string(stages * (p.weight_bytes + x_bytes) + behind) +
                " bytes of shared memory in " + std::to_string(stages) + " stages, and may have " +
                std::to_string(plan.shared_bytes) + " and " + std::to_string(block_steps));
    return p.tail_offset + behind;
}

}  // namespace

void launch(const Problem& q, const Squares& squares, const Plan& plan, bool overlap, cudaStream_t stream) {
    check(q, squares, plan);
    const int tokens = padded_tokens(q.num_tokens);

    Params p{};
    p.residual = q.residual, p.out = q.out, p.squares = squares;
    p.num_tokens = q.num_tokens, p.num_rows = q.num_rows, p.size = q.size, p.eps = q.eps;
    p.splits = plan.splits, p.trigger = plan.trigger;
    p.tile_rows = plan.tile_rows, p.units = plan.tile_rows / kUnitRows;
    const bool many_tiles = makes_many_tiles(q.form);
    const Kernel kernel = select_kernel(q.form, tokens, p.tile_rows);
    const int panels = stage_panels(tokens, kernel.rows);
    p.steps = divide_up(q.size / kPanelColumns, panels);
    const int most_splits = many_tiles ? 1 : std::min(kMaxSplits, p.steps);  // each has something to multiply
    require(p.splits >= 1 && p.splits <= most_splits,
            "splits is " + std::to_string(p.splits) + "; supported here: 1 to " + std::to_string(most_splits));
    const int block_steps = many_tiles ? kMaxStages : divide_up(p.steps, p.splits);  // or more
    const int bytes = lay_out(p, plan, kernel.rows, panels, tokens, block_steps);

    common::allow_shared_memory(kernel.function, common::shared_memory_limit(), true);
    CUtensorMap weight = common::panel_map(q.weight, q.num_rows, q.size, many_tiles ? kBoxRows : p.tile_rows, panels);
    CUtensorMap x = common::panel_map(q.x, q.num_tokens, q.size, tokens, panels);

    const int blocks = many_tiles ? std::min(common::multiprocessors(), divide_up(q.num_rows, kBoxRows))
                                  : divide_up(q.num_rows, p.tile_rows) * p.splits;
    common::LaunchConfig config(dim3(blocks), threads(q.form), bytes, stream);
    void* arguments[] = {&weight, &x, &p};
    config.in_clusters(p.splits).overlapping(overlap).launch(kernel.function, arguments);
}

}  // namespace batch_linear
