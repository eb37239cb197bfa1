// What a family's host side needs before it launches a kernel of its own on Hopper: tensor maps for the copy engine,
// and leave to use more than 48 KB of shared memory.
#pragma once
#include <cuda.h>

#include <mutex>
#include <set>
#include <utility>

#include "common/cuda_check.h"
#include "common/linear.h"

namespace common {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, asked of the runtime, not linked: the library must load where there is no driver.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        CHECK_CUDA(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<EncodeTiled>(entry);
    }();
    return function;
}

inline void check_map(CUresult status) {
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status));
}

// A row-major bf16 matrix as panels of 64 columns, (column, row, panel), copied in boxes of `box_rows` of `box_panels`
// (async.cuh: tma_load_panels); zeros beyond its edges.
inline CUtensorMap panel_map(const void* matrix, int rows, int columns, int box_rows, int box_panels) {
    const cuuint64_t sizes[] = {kPanelColumns, cuuint64_t(rows), cuuint64_t(columns / kPanelColumns)};
    const cuuint64_t strides[] = {cuuint64_t(columns) * 2, kPanelColumns * 2};
    const cuuint32_t box[] = {kPanelColumns, cuuint32_t(box_rows), cuuint32_t(box_panels)}, steps[] = {1, 1, 1};
    CUtensorMap map;
    check_map(encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(matrix), sizes, strides, box,
                             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

// A block of `kernel` may use more than 48 KB of shared memory only after this; asked once per kernel and device.
// `whole`: split every multiprocessor's memory in favour of shared memory, alike for all kernels of a chain, because to
// change it a multiprocessor has to run empty.
inline void allow_shared_memory(const void* kernel, int bytes, bool whole = false) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> done;
    int device = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    if (done.count({kernel, device})) return;
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (whole)
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    done.insert({kernel, device});
}

// The most shared memory that a block may ask for on the current device.
inline int shared_memory_limit() {
    int device = 0, bytes = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
}

}  // namespace common
