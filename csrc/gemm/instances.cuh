// One translation unit an epilogue, and one for fp16, so that they compile in parallel.
#pragma once
#include "gemm/kernel.cuh"
#include "gemm/kernels.h"

namespace gemm {

template <typename T, Epilogue kEpilogue, int kRows, int kSplits = 1>
Kernel instantiate() {
    using Shape = gemm::Shape<kEpilogue, kRows, kSplits>;
    return {reinterpret_cast<const void*>(gemm_kernel<T, Shape>), Shape::kSharedBytes};
}

}  // namespace gemm
