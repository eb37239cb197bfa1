#include "gemm/instances.cuh"

// Models come in bf16: others get along with the one plan.
gemm::Kernel gemm::half_kernel(Epilogue epilogue, const Plan& plan) {
    if (key(plan) != key({256, 1})) return {};
    switch (epilogue) {
        case Epilogue::kPlain:
            return instantiate<__half, Epilogue::kPlain, 256>();
        case Epilogue::kResidual:
            return instantiate<__half, Epilogue::kResidual, 256>();
        case Epilogue::kSwiglu:
            return instantiate<__half, Epilogue::kSwiglu, 256>();
    }
    return {};
}
