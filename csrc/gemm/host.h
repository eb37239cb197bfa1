// What both launchers do before they launch: checks and tensor maps.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "gemm/gemm.h"

namespace gemm {

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

inline void check(const Gemm& g) {
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
inline CUtensorMap matrix_map(const void* matrix, common::Dtype dtype, int rows, int columns, int box_rows) {
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

inline int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// Both kernels run in clusters, and may start while the previous kernel still runs.
struct LaunchConfig {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    LaunchConfig(int blocks, int cluster, int threads, int shared_bytes, cudaStream_t stream) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = cluster;
        attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = 2;
    }
    LaunchConfig(const LaunchConfig&) = delete;  // config points into it
};

}  // namespace gemm
