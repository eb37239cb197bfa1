// The host side of the products for one decode step's tokens. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include "batch_linear/params.h"

namespace batch_linear {

using common::Problem;

// splits: blocks of the cluster that makes a tile of tile_rows. trigger: stages left to ask for when the next kernel
// may start. shared_bytes: the most that a block may use. ahead: stages of weight that are asked for before the
// previous kernel has ended, if the ring has so many. x_stages: for how many stages x is there or under way, at most.
struct Plan {
    int splits, trigger, shared_bytes, tile_rows, ahead, x_stages;
};

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails. `overlap`: programmatic dependent launch.
void launch(const Problem& problem, const Squares& squares, const Plan& plan, bool overlap, cudaStream_t stream);

}  // namespace batch_linear
