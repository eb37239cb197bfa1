#include "common/launch.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/require.h"
#include "common/tensor_map.h"
#include "gemm/kernels.h"
#include "gemm/params.h"

namespace gemm {
namespace {

using common::require, common::require_aligned;

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
    for (const auto& operand : operands) require_aligned(operand.pointer, operand.name);
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

Kernel kernel_for(const Gemm& g, const Plan& plan, common::Dtype dtype) {
    if (dtype == common::Dtype::kFloat16) return half_kernel(g.epilogue, plan);
    switch (g.epilogue) {
        case Epilogue::kPlain:
            return plain_kernel(plan);
        case Epilogue::kResidual:
            return residual_kernel(plan);
        case Epilogue::kSwiglu:
            return swiglu_kernel(plan);
    }
    throw std::invalid_argument("unknown epilogue");
}

// Clusters of a kernel that the current device runs at once; asked once per kernel and device.
int clusters_at_once(const Kernel& kernel) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> known;
    int device = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    int& count = known[{kernel.function, device}];
    if (count) return count;
    common::LaunchConfig one(dim3(kCluster), kThreads, kernel.shared_bytes, nullptr);
    CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, kernel.function, &one.in_clusters(kCluster).get()));
    return count;
}

Tiling tiling_of(const Gemm& g, const Plan& plan) {
    Tiling t{};
    t.tiles_tokens = ceil_div(g.num_tokens, plan.tokens * kCluster);
    t.tiles_rows = ceil_div(g.num_rows, plan.rows);
    t.steps = ceil_div(g.size, kStageColumns);
    t.parts = t.tiles_tokens * t.tiles_rows * plan.splits;
    require(t.steps >= plan.splits, "size is " + std::to_string(g.size) + "; for " + std::to_string(plan.splits) +
                                        " parts it must be over " + std::to_string((plan.splits - 1) * kStageColumns));
    return t;
}

Exchange exchange_in(const Workspace& workspace, const Plan& plan, int parts) {
    if (plan.splits == 1) return {};
    require(parts <= kMostClusters,
            std::to_string(parts) + " parts of tiles; supported: " + std::to_string(kMostClusters) + " at most");
    const int64_t needed = kCounterBytes + int64_t(parts) * exchange_bytes(plan.rows, plan.splits);
    require(workspace.data && reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0 && workspace.bytes >= needed,
            "the workspace has " + std::to_string(workspace.bytes) + " bytes; expected " + std::to_string(needed) +
                ", 16-byte aligned");
    return {static_cast<unsigned*>(workspace.data),
            reinterpret_cast<float4*>(static_cast<char*>(workspace.data) + kCounterBytes)};
}

// Parts wait for each other: one that had no place yet would keep the others waiting for ever.
void check_room(const Kernel& kernel, const Plan& plan, int parts) {
    if (plan.splits == 1) return;
    const int most = clusters_at_once(kernel);
    require(parts <= most,
            std::to_string(parts) + " parts of tiles must run at once; this GPU has room for " + std::to_string(most));
}

TensorMaps maps_of(const Gemm& g, const Plan& plan, common::Dtype dtype) {
    const int out_columns = g.epilogue == Epilogue::kSwiglu ? g.num_rows / 2 : g.num_rows;
    TensorMaps maps{};
    maps.x = matrix_map(g.x, dtype, g.num_tokens, g.size, plan.tokens);
    maps.weight = matrix_map(g.weight, dtype, g.num_rows, g.size, plan.rows / weight_boxes(plan.splits));
    maps.out = matrix_map(g.out, dtype, g.num_tokens, out_columns, kUnitTokens);
    if (g.residual) maps.residual = matrix_map(g.residual, dtype, g.num_tokens, out_columns, kUnitTokens);
    return maps;
}

}  // namespace

int64_t workspace_bytes(int clusters) {
    return kCounterBytes + int64_t(clusters) * exchange_bytes(256, 4);
}

void launch(const Gemm& g, const Plan& plan, const Workspace& workspace, const Launch& how) {
    check(g);
    const Kernel kernel = kernel_for(g, plan, how.dtype);
    require(kernel.function, "no kernel for this dtype and epilogue makes tiles of " + std::to_string(plan.rows) +
                                 " rows by " + std::to_string(plan.tokens) + " tokens in " +
                                 std::to_string(plan.splits) + " parts; all have 256 by 128 in 1 part");
    Tiling tiling = tiling_of(g, plan);
    Exchange exchange = exchange_in(workspace, plan, tiling.parts);
    common::allow_shared_memory(kernel.function, kernel.shared_bytes);
    check_room(kernel, plan, tiling.parts);
    TensorMaps maps = maps_of(g, plan, how.dtype);
    const int clusters = std::min(common::multiprocessors() / kCluster, tiling.parts);
    tiling.claimed = tiling.parts >= kMinClaimedRounds * clusters && tiling.steps >= kMinClaimedSteps;
    common::LaunchConfig config(dim3(clusters * kCluster), kThreads, kernel.shared_bytes, how.stream);
    void* arguments[] = {&maps, &tiling, &exchange};
    config.in_clusters(kCluster).overlapping().launch(kernel.function, arguments);
}

}  // namespace gemm
