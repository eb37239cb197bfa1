#include "layer_products/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor_map.h"

namespace layer_products {

struct TensorMaps {
    CUtensorMap weight[kMaxProducts], tokens[kMaxProducts];
};

template <int kTokens>
const void* kernel_for();

uintptr_t clocks_pointer = 0;
namespace {

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

void check(const Problem& q) {
    require(q.size >= kStageColumns && q.size % kStageColumns == 0,
            "size is " + std::to_string(q.size) + "; expected a multiple of " + std::to_string(kStageColumns));
    require(q.num_rows >= kUnitRows && q.num_rows % kUnitRows == 0,
            "num_rows is " + std::to_string(q.num_rows) + "; expected a multiple of " + std::to_string(kUnitRows));
    require((q.form == Form::kLinearAdd) == (q.residual != nullptr),
            "linear_add takes a residual, the other forms do not");
    require((q.norm != nullptr) == (q.normed != nullptr) && (!q.norm || q.form == Form::kLinearAdd),
            "linear_add may take a norm, with room for its result; the other forms do not");
    require((has_norm(q.form) || q.norm) == (q.squares != nullptr),
            "squares are for a norm: to be written by linear_add, to be read by the other forms");
    const struct {
        const char* name;
        const void* pointer;
    } operands[] = {{"x", q.x},           {"weight", q.weight},     {"out", q.out},        {"norm", q.norm},
                    {"normed", q.normed}, {"residual", q.residual}, {"squares", q.squares}};
    for (const auto& operand : operands)
        require(reinterpret_cast<uintptr_t>(operand.pointer) % 16 == 0,
                std::string(operand.name) + " must be 16-byte aligned");
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

const void* select_kernel(int tokens) {
    switch (tokens) {
        case 16:
            return kernel_for<16>();
        case 32:
            return kernel_for<32>();
        case 64:
            return kernel_for<64>();
        default:
            return kernel_for<128>();
    }
}

}  // namespace

void launch(const std::vector<Problem>& problems, int num_tokens, float eps, void* words, void* sums, int blocks,
            int trigger, bool overlap, cudaStream_t stream) {
    require(!problems.empty() && problems.size() <= kMaxProducts,
            std::to_string(problems.size()) + " products; supported: 1 to " + std::to_string(kMaxProducts));
    require(num_tokens >= 1 && num_tokens <= kMaxTokens,
            "num_tokens is " + std::to_string(num_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    require(blocks >= 1, "blocks is " + std::to_string(blocks) + "; expected at least 1");
    for (const Problem& q : problems) check(q);
    const int multiprocessors = common::multiprocessors();
    require(blocks <= multiprocessors, "blocks is " + std::to_string(blocks) +
                                           "; they wait for each other, and this GPU runs " +
                                           std::to_string(multiprocessors) + " at once");

    const int tokens = padded_tokens(num_tokens), limit = common::shared_memory_limit();
    Params p{};
    p.count = int(problems.size()), p.num_tokens = num_tokens, p.eps = eps, p.trigger = trigger;
    p.stages = std::min(kMaxStages, (limit - int(sizeof(Tail))) / stage_bytes(tokens));
    p.ahead = trigger / 10000 % 100, p.ahead_start = trigger / 100 % 100, p.trigger = trigger % 100;
    p.clocks = reinterpret_cast<long long*>(clocks_pointer);
    p.words = static_cast<uint32_t*>(words), p.sums = static_cast<float4*>(sums);
    TensorMaps maps{};
    int most = 0;
    for (int i = 0; i < p.count; ++i) {
        const Problem& q = problems[i];
        const int tiles = divide_up(q.num_rows, kTileRows), steps = q.size / kStageColumns;
        const int shares = std::max(1, std::min(blocks, tiles * steps / kMinSteps));
        p.products[i] = {q.residual, q.norm, q.out, q.normed, static_cast<float*>(q.squares), q.form, q.num_rows,
                         q.size,     tiles,  steps, shares};
        maps.weight[i] = matrix_map(q.weight, q.num_rows, q.size, kTileRows);
        maps.tokens[i] = matrix_map(q.x, num_tokens, q.size, tokens);
        most = std::max(most, shares);
    }
    const void* kernel = select_kernel(tokens);
    common::allow_shared_memory(kernel, limit, true);

    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(most);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = p.stages * stage_bytes(tokens) + int(sizeof(Tail));
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap;
    void* arguments[] = {&maps, &p};
    CHECK_CUDA(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace layer_products
