#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "gemm/kernel.cuh"

namespace gemm {
namespace {

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

void check(const Gemm& g) {
    require(g.num_tokens >= 1, "there are no tokens");
    const int unit = g.epilogue == Epilogue::kSwiglu ? 16 : 8;
    require(g.num_rows >= unit && g.num_rows % unit == 0,
            "num_rows is " + std::to_string(g.num_rows) + "; expected a multiple of " + std::to_string(unit));
    require(g.size >= 8 && g.size % 8 == 0, "size is " + std::to_string(g.size) + "; expected a multiple of 8");
    const struct {
        const char* name;
        const void* pointer;
    } operands[] = {{"x", g.x}, {"weight", g.weight}, {"out", g.out}, {"residual", g.residual}};
    for (const auto& operand : operands)
        require(reinterpret_cast<uintptr_t>(operand.pointer) % 16 == 0,
                std::string(operand.name) + " must be 16-byte aligned");
    require((g.epilogue == Epilogue::kResidual) == (g.residual != nullptr),
            "a residual belongs to the epilogue that adds it, and to no other");
}

// A row-major matrix, copied in boxes of `box_rows` by 64 columns (128 bytes, swizzled); zeros beyond its edges.
CUtensorMap matrix_map(const void* matrix, common::Dtype dtype, int rows, int columns, int box_rows) {
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(columns) * 2};
    const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
    const auto type =
        dtype == common::Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUtensorMap map;
    common::check_map(common::encode_tiled()(&map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

template <typename T, typename Layout, Epilogue kEpilogue>
void launch_kernel(const Gemm& g, const Launch& how) {
    const int out_columns = kEpilogue == Epilogue::kSwiglu ? g.num_rows / 2 : g.num_rows;
    TensorMaps maps{};
    maps.x = matrix_map(g.x, how.dtype, g.num_tokens, g.size, kTileTokens);
    maps.weight = matrix_map(g.weight, how.dtype, g.num_rows, g.size, kTileRows / 2);
    maps.out = matrix_map(g.out, how.dtype, g.num_tokens, out_columns, kGroupTokens);
    if (g.residual) maps.residual = matrix_map(g.residual, how.dtype, g.num_tokens, out_columns, kGroupTokens);
    Tiling tiling{};
    tiling.tiles_tokens = ceil_div(g.num_tokens, kTileTokens * kCluster);
    tiling.tiles_rows = ceil_div(g.num_rows, kTileRows);
    tiling.steps = ceil_div(g.size, kStageColumns);

    const void* kernel = reinterpret_cast<const void*>(gemm_kernel<T, Layout, kEpilogue>);
    common::allow_shared_memory(kernel, Layout::kSharedBytes);
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = kCluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(std::min(common::multiprocessors() / kCluster, tiling.tiles_tokens * tiling.tiles_rows) * kCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = Layout::kSharedBytes;
    config.stream = how.stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    void* arguments[] = {&maps, &tiling};
    CHECK_CUDA(cudaLaunchKernelExC(&config, kernel, arguments));
}

template <typename T>
void launch_for(const Gemm& g, const Launch& how) {
    using Deep = Layout<4, 2>;
    using Wide = Layout<3, 4>;  // with a residual, buffers for a whole tile hide the way there and back
    switch (g.epilogue) {
        case Epilogue::kPlain:
            return launch_kernel<T, Deep, Epilogue::kPlain>(g, how);
        case Epilogue::kResidual:
            return launch_kernel<T, Wide, Epilogue::kResidual>(g, how);
        case Epilogue::kSwiglu:
            return launch_kernel<T, Deep, Epilogue::kSwiglu>(g, how);
    }
    throw std::invalid_argument("unknown epilogue");
}

}  // namespace

void launch(const Gemm& g, const Launch& how) {
    check(g);
    how.dtype == common::Dtype::kBFloat16 ? launch_for<__nv_bfloat16>(g, how) : launch_for<__half>(g, how);
}

}  // namespace gemm
