#include "gemm/instances.cuh"

template <int kRows, int kSplits>
using Of = gemm::Shape<gemm::Epilogue::kSwiglu, kRows, kSplits>;

gemm::Kernel gemm::swiglu_kernel(const Plan& plan) {
    return select<__nv_bfloat16, Of<256, 1>, Of<224, 1>>(plan);
}
