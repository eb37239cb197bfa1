// One translation unit a token count, so that they compile in parallel.
#pragma once
#include "skinny_linear/kernel.cuh"

namespace skinny_linear {

// The kernel for tiles of up to Grid::kRows rows.
template <int kTokenTiles>
const void* kernel_for(int grid, Form form);

template <class Grid, int kTokenTiles>
const void* of_form(Form form) {
    switch (form) {
        case Form::kNormLinear:
            return reinterpret_cast<const void*>(skinny_kernel<Grid, kTokenTiles, Form::kNormLinear>);
        case Form::kLinearAdd:
            return reinterpret_cast<const void*>(skinny_kernel<Grid, kTokenTiles, Form::kLinearAdd>);
        default:
            return reinterpret_cast<const void*>(skinny_kernel<Grid, kTokenTiles, Form::kNormSwiGlu>);
    }
}

template <int kTokenTiles>
const void* instantiate(int grid, Form form) {
    if constexpr (kTokenTiles <= 2) {
        if (grid == 0) return of_form<WarpGrid<1, 1>, kTokenTiles>(form);
        if (grid == 1) return of_form<WarpGrid<2, 1>, kTokenTiles>(form);
        if (grid == 2) return of_form<WarpGrid<2, 2>, kTokenTiles>(form);
        return of_form<WarpGrid<2, 4>, kTokenTiles>(form);
    } else {
        if (grid == 2) return of_form<WarpGrid<2, 2, 2, 2>, kTokenTiles>(form);
        return grid == 3 ? of_form<WarpGrid<2, 4, 2, 2>, kTokenTiles>(form) : nullptr;
    }
}

}  // namespace skinny_linear
