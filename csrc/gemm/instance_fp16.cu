#include "gemm/instances.cuh"

// Models come in bf16: others get along with the one plan.
gemm::Kernel gemm::half_kernel(Epilogue epilogue, const Plan& plan) {
    switch (epilogue) {
        case Epilogue::kPlain:
            return select<__half, Shape<Epilogue::kPlain, 256, 1>>(plan);
        case Epilogue::kResidual:
            return select<__half, Shape<Epilogue::kResidual, 256, 1>>(plan);
        case Epilogue::kSwiglu:
            return select<__half, Shape<Epilogue::kSwiglu, 256, 1>>(plan);
    }
    return {};
}
