// One translation unit an epilogue, and one for fp16, so that they compile in parallel.
#pragma once
#include "gemm/kernel.cuh"
#include "gemm/kernels.h"

namespace gemm {

// That of `Shapes` which is the plan's.
template <typename T, typename... Shapes>
Kernel select(const Plan& plan) {
    Kernel found;
    const auto consider = [&](int rows, int splits, int tokens, const void* function, int shared_bytes) {
        if (plan.rows == rows && plan.splits == splits && plan.tokens == tokens) found = {function, shared_bytes};
    };
    (consider(Shapes::kRows, Shapes::kSplits, Shapes::kTokens, reinterpret_cast<const void*>(gemm_kernel<T, Shapes>),
              Shapes::kSharedBytes),
     ...);
    return found;
}

}  // namespace gemm
