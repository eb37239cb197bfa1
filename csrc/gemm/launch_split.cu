#include "gemm/split_instances.cuh"

namespace gemm {

void launch_split(const Gemm& g, const Split& split, const Launch& how) {
    check(g);
    require(g.epilogue != Epilogue::kSwiglu, "SwiGLU is not split");
    const auto select =
        how.dtype == common::Dtype::kBFloat16 ? select_split_kernel<__nv_bfloat16> : select_split_kernel<__half>;
    const SplitKernel kernel = select(split.rows, split.splits, split.shared);
    require(kernel.function, "there is no kernel for tiles of " + std::to_string(split.rows) + " rows in " +
                                 std::to_string(split.splits) + " parts by " + std::to_string(split.shared));
    SplitParams p{};
    p.residual = g.residual, p.out = g.out;
    p.num_tokens = g.num_tokens, p.num_rows = g.num_rows;
    p.tiles_rows = ceil_div(g.num_rows, split.rows);
    p.steps = ceil_div(g.size, kStageColumns);
    require(p.steps >= split.splits, "size is too small for " + std::to_string(split.splits) + " parts");

    SplitMaps maps;
    maps.x = matrix_map(g.x, how.dtype, g.num_tokens, g.size, kTileTokens);
    maps.weight = matrix_map(g.weight, how.dtype, g.num_rows, g.size, kernel.box_rows);
    common::allow_shared_memory(kernel.function, kernel.shared_bytes);
    const int tiles = ceil_div(g.num_tokens, kernel.tile_tokens) * p.tiles_rows;
    const LaunchConfig launch(tiles * kernel.blocks, kernel.blocks, kThreads, kernel.shared_bytes, how.stream);
    void* arguments[] = {&maps, &p};
    CHECK_CUDA(cudaLaunchKernelExC(&launch.config, kernel.function, arguments));
}

}  // namespace gemm
