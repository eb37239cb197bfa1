// The host side of the skinny matrix product: checks, tiling, tensor maps, launch. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include "linear/params.h"

namespace linear {

constexpr int kMaxTokens = 128;

struct Problem {
    const void *x, *weight;                   // [num_tokens, size], [num_rows, size]
    const void *norm_weight, *residual;       // or null
    void* out;
    int num_tokens, num_rows, size;
    float eps;
    Epilogue epilogue;
};

// What the choice of tiles depends on: clusters[i] of 2^i blocks fit on the GPU at once, one block an SM.
struct Machine {
    int clusters[4];
    int shared_limit;  // bytes a block may have
};

struct Tiling {
    int tile_rows, tiles, splits, sharers, grid, stages, shared_bytes;
    bool one_tile;
};

// Tokens that the kernel for `num_tokens` takes: 8, 16, 32, 64 or 128.
int padded_tokens(int num_tokens);

// Parts of a tiling that the caller wants; 0 leaves the choice to choose_tiling.
struct Wish {
    int tile_rows, splits, sharers;
};

// The tiling that should take the least time. Throws std::invalid_argument if the shape or the wish is not supported.
Tiling choose_tiling(int num_tokens, int num_rows, int size, Epilogue epilogue, const Machine& machine, const Wish& wish);

// What the current device has room for. Throws std::invalid_argument if it is not of compute capability 9.0.
const Machine& this_machine();

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA fails.
// `overlap`: programmatic dependent launch.
void skinny(const Problem& problem, const Wish& wish, bool overlap, cudaStream_t stream);

}  // namespace linear
