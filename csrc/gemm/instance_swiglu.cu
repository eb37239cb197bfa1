#include "gemm/instances.cuh"

template <int kRows, int kSplits, int kTokens = 128>
using Of = gemm::Shape<gemm::Epilogue::kSwiglu, kRows, kSplits, kTokens>;

gemm::Kernel gemm::swiglu_kernel(const Plan& plan) {
    return select<__nv_bfloat16, Of<256, 1>, Of<192, 1, 256>, Of<224, 1>>(plan);
}
