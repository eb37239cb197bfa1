#include "gemm/instances.cuh"

gemm::Kernel gemm::plain_kernel(const Plan& plan) {
    using T = __nv_bfloat16;
    switch (key(plan)) {
        case key({256, 1}):
            return instantiate<T, Epilogue::kPlain, 256>();
        case key({192, 1}):
            return instantiate<T, Epilogue::kPlain, 192>();
        case key({128, 1}):
            return instantiate<T, Epilogue::kPlain, 128>();
        case key({256, 2}):
            return instantiate<T, Epilogue::kPlain, 256, 2>();
        case key({192, 2}):
            return instantiate<T, Epilogue::kPlain, 192, 2>();
        case key({128, 2}):
            return instantiate<T, Epilogue::kPlain, 128, 2>();
        case key({256, 4}):
            return instantiate<T, Epilogue::kPlain, 256, 4>();
    }
    return {};
}
