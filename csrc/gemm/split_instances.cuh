// One translation unit a type, so that they compile in parallel.
#pragma once
#include "gemm/host.h"
#include "gemm/split.cuh"

namespace gemm {

struct SplitKernel {
    const void* function;
    int shared_bytes, blocks, tile_tokens, box_rows;
};

template <typename T, typename Shape>
SplitKernel split_kernel_of() {
    const auto* function = reinterpret_cast<const void*>(split_kernel<T, Shape>);
    return {function, Shape::kSharedBytes, Shape::kBlocks, Shape::kShared * kTileTokens, Shape::kBoxRows};
}

// Its function is null where there is none.
template <typename T>
SplitKernel select_split_kernel(int rows, int splits, int shared) {
    if (rows == 128 && splits == 2 && shared == 1) return split_kernel_of<T, SplitShape<128, 2, 1>>();
    if (rows == 192 && splits == 2 && shared == 1) return split_kernel_of<T, SplitShape<192, 2, 1>>();
    if (rows == 144 && splits == 4 && shared == 2) return split_kernel_of<T, SplitShape<144, 4, 2>>();
    return {};
}

extern template SplitKernel select_split_kernel<__nv_bfloat16>(int rows, int splits, int shared);
extern template SplitKernel select_split_kernel<__half>(int rows, int splits, int shared);

}  // namespace gemm
