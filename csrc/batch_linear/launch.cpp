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
        const int count = squares.sums ? q.num_rows / kUnitRows : 0;
        require(squares.count == count, found + std::to_string(count) + ", of out");
    }
}

void check(const Problem& q, const Squares& squares, const Plan& plan) {
    require(q.num_tokens >= 1 && q.num_tokens <= kMaxTokens,
            "num_tokens is " + std::to_string(q.num_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    require(q.size >= kStageColumns && q.size % kStageColumns == 0,
            "size is " + std::to_string(q.size) + "; expected a multiple of " + std::to_string(kStageColumns));
    require(q.num_rows >= kUnitRows && q.num_rows % kUnitRows == 0,
            "num_rows is " + std::to_string(q.num_rows) + "; expected a multiple of " + std::to_string(kUnitRows));
    const int most = std::min(kMaxSplits, q.size / kStageColumns);
    require(plan.splits >= 1 && plan.splits <= most,
            "splits is " + std::to_string(plan.splits) + "; supported here: 1 to " + std::to_string(most));
    const int tallest = tallest_tile(q.form, padded_tokens(q.num_tokens));
    require(plan.tile_rows >= kMinTileRows && plan.tile_rows <= tallest && plan.tile_rows % kUnitRows == 0,
            "tile_rows is " + std::to_string(plan.tile_rows) + "; supported here: multiples of " +
                std::to_string(kUnitRows) + " from " + std::to_string(kMinTileRows) + " to " + std::to_string(tallest));
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

// A row-major bf16 matrix, copied in boxes of `box_rows` by 64 columns; zeros beyond its edges.
CUtensorMap matrix_map(const void* matrix, int rows, int columns, int box_rows) {
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(columns) * 2};
    const cuuint32_t box[] = {kStageColumns, cuuint32_t(box_rows)}, steps[] = {1, 1};
    CUtensorMap map;
    common::check_map(common::encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix),
                                             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

Kernel select_kernel(Form form, int tokens, int tile_rows) {
    switch (form) {
        case Form::kNormLinear:
            return kernel_for<Form::kNormLinear>(tokens, tile_rows);
        case Form::kLinearAdd:
            return kernel_for<Form::kLinearAdd>(tokens, tile_rows);
        case Form::kNormSwiGlu:
            return kernel_for<Form::kNormSwiGlu>(tokens, tile_rows);
    }
    throw std::invalid_argument("unknown form");
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
    const int bytes_of_stage = stage_bytes(p.tile_rows, tokens);
    p.steps = q.size / kStageColumns;
    const int block_steps = divide_up(p.steps, p.splits);
    const Kernel kernel = select_kernel(q.form, tokens, p.tile_rows);
    // What is read behind a tile that is not so high has to be there behind the last stage as well.
    const int behind = std::max(int(sizeof(Tail)), row_bytes(kernel.rows) - bytes_of_stage);
    p.stages = std::min({kMaxStages, block_steps, (plan.shared_bytes - behind) / bytes_of_stage});
    const int received = p.splits == 1 ? 0 : received_bytes(tokens, p.splits, divide_up(p.units, p.splits));
    const int least = std::max(std::min(2, block_steps), divide_up(received, bytes_of_stage));
    require(p.stages >= least, "a block needs " + std::to_string(least * bytes_of_stage + behind) +
                                   " bytes of shared memory in " + std::to_string(least) + " stages, and may have " +
                                   std::to_string(plan.shared_bytes) + " and " + std::to_string(block_steps));
    p.ahead = std::min(plan.ahead, p.stages);
    p.x_offset = p.stages * row_bytes(p.tile_rows), p.tail_offset = p.stages * bytes_of_stage;
    const int bytes = p.tail_offset + behind;

    common::allow_shared_memory(kernel.function, common::shared_memory_limit(), true);
    CUtensorMap weight = matrix_map(q.weight, q.num_rows, q.size, p.tile_rows);
    CUtensorMap x = matrix_map(q.x, q.num_tokens, q.size, tokens);

    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = p.splits;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(divide_up(q.num_rows, p.tile_rows) * p.splits);
    config.blockDim = dim3(threads(q.form));
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = p.splits > 1 ? attributes : attributes + 1;
    config.numAttrs = (p.splits > 1) + overlap;
    void* arguments[] = {&weight, &x, &p};
    CHECK_CUDA(cudaLaunchKernelExC(&config, kernel.function, arguments));
}

}  // namespace batch_linear
