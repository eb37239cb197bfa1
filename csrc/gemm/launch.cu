#include "gemm/host.h"
#include "gemm/kernel.cuh"

namespace gemm {
namespace {

template <typename T, typename Layout, Epilogue kEpilogue>
void launch_kernel(const Gemm& g, const Launch& how) {
    const int out_columns = kEpilogue == Epilogue::kSwiglu ? g.num_rows / 2 : g.num_rows;
    TensorMaps maps{};
    maps.x = matrix_map(g.x, how.dtype, g.num_tokens, g.size, kTileTokens);
    maps.weight = matrix_map(g.weight, how.dtype, g.num_rows, g.size, kTileRows / 2);
    maps.out = matrix_map(g.out, how.dtype, g.num_tokens, out_columns, kGroupTokens);
    if (g.residual) maps.residual = matrix_map(g.residual, how.dtype, g.num_tokens, out_columns, kGroupTokens);
    Tiling tiling{};
    tiling.tiles_tokens = ceil_div(g.num_tokens, kTileTokens * kCluster);
    tiling.tiles_rows = ceil_div(g.num_rows, kTileRows);
    tiling.steps = ceil_div(g.size, kStageColumns);

    const void* kernel = reinterpret_cast<const void*>(gemm_kernel<T, Layout, kEpilogue>);
    common::allow_shared_memory(kernel, Layout::kSharedBytes);
    const int clusters = std::min(common::multiprocessors() / kCluster, tiling.tiles_tokens * tiling.tiles_rows);
    const LaunchConfig launch(clusters * kCluster, kCluster, kThreads, Layout::kSharedBytes, how.stream);
    void* arguments[] = {&maps, &tiling};
    CHECK_CUDA(cudaLaunchKernelExC(&launch.config, kernel, arguments));
}

template <typename T>
void launch_for(const Gemm& g, const Launch& how) {
    using Deep = Layout<4, 2>;
    using Wide = Layout<3, 4>;  // with a residual, buffers for a whole tile hide the way there and back
    switch (g.epilogue) {
        case Epilogue::kPlain:
            return launch_kernel<T, Deep, Epilogue::kPlain>(g, how);
        case Epilogue::kResidual:
            return launch_kernel<T, Wide, Epilogue::kResidual>(g, how);
        case Epilogue::kSwiglu:
            return launch_kernel<T, Deep, Epilogue::kSwiglu>(g, how);
    }
    throw std::invalid_argument("unknown epilogue");
}

}  // namespace

void launch(const Gemm& g, const Launch& how) {
    check(g);
    how.dtype == common::Dtype::kBFloat16 ? launch_for<__nv_bfloat16>(g, how) : launch_for<__half>(g, how);
}

}  // namespace gemm
