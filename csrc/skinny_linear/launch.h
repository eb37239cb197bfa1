// The host side of the skinny product: checks, tensor maps, launch. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include "skinny_linear/params.h"

namespace skinny_linear {

using common::Problem;

// tile_rows: of weight, that a cluster of `splits` blocks makes. shared_bytes: the most that a block may use. trigger:
// stages left to ask for when the next kernel may start. ahead: stages of weight that are asked for before the previous
// kernel has ended, if the ring has so many.
struct Plan {
    int tile_rows, splits, shared_bytes, trigger, ahead;
};

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails.
// `overlap`: programmatic dependent launch.
void launch(const Problem& problem, const Plan& plan, bool overlap, cudaStream_t stream);

}  // namespace skinny_linear
