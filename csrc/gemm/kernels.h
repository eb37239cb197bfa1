// The compiled kernels, by their plan.
#pragma once
#include "gemm/gemm.h"

namespace gemm {

struct Kernel {
    const void* function = nullptr;  // none: not compiled
    int shared_bytes = 0;
};

Kernel plain_kernel(const Plan& plan);
Kernel residual_kernel(const Plan& plan);
Kernel swiglu_kernel(const Plan& plan);
Kernel half_kernel(Epilogue epilogue, const Plan& plan);  // fp16; the others are bf16

}  // namespace gemm
