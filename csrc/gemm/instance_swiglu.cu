#include "gemm/instances.cuh"

gemm::Kernel gemm::swiglu_kernel(const Plan& plan) {
    using T = __nv_bfloat16;
    switch (key(plan)) {
        case key({256, 1}):
            return instantiate<T, Epilogue::kSwiglu, 256>();
        case key({224, 1}):
            return instantiate<T, Epilogue::kSwiglu, 224>();
    }
    return {};
}
