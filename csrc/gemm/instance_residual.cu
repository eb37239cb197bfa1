#include "gemm/instances.cuh"

template <int kRows, int kSplits, int kTokens = 128>
using Of = gemm::Shape<gemm::Epilogue::kResidual, kRows, kSplits, kTokens>;

gemm::Kernel gemm::residual_kernel(const Plan& plan) {
    return select<__nv_bfloat16, Of<256, 1>, Of<192, 1, 256>, Of<192, 1>, Of<128, 1>, Of<256, 2>, Of<128, 2>,
                  Of<256, 4>>(plan);
}
