// The host side of the skinny product: checks, tensor maps, launch. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include "skinny_linear/params.h"

namespace skinny_linear {

using common::Problem;

// How a product is cut: tiles of tile_rows rows, each made by a cluster of `splits` blocks.
struct Tiling {
    int tile_rows, splits;
};

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails.
// `overlap`: programmatic dependent launch.
void launch(const Problem& problem, const Tiling& tiling, bool overlap, cudaStream_t stream);

}  // namespace skinny_linear
