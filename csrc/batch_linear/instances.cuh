// One translation unit a form, so that they compile in parallel.
#pragma once
#include "batch_linear/kernel.cuh"

namespace batch_linear {

template <Form kForm, int kTokens, int kIndex = 0>
Kernel instantiate(int tile_rows) {
    constexpr auto heights = tile_heights<kForm, kTokens>();
    if constexpr (kIndex + 1 < heights.size())
        if (tile_rows > heights[kIndex]) return instantiate<kForm, kTokens, kIndex + 1>(tile_rows);
    return {reinterpret_cast<const void*>(batch_linear_kernel<kTokens, heights[kIndex], kForm>), heights[kIndex]};
}

// That for `tokens`, which is one of kTokenCounts, and for tiles of so many rows.
template <Form kForm>
Kernel kernel_for(int tokens, int tile_rows) {
    switch (tokens) {
        case 16:
            return instantiate<kForm, 16>(tile_rows);
        case 32:
            return instantiate<kForm, 32>(tile_rows);
        case 48:
            return instantiate<kForm, 48>(tile_rows);
        case 64:
            return instantiate<kForm, 64>(tile_rows);
        case 96:
            return instantiate<kForm, 96>(tile_rows);
        default:
            return instantiate<kForm, 128>(tile_rows);
    }
}

}  // namespace batch_linear
