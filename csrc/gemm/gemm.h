// The host side of the large matrix products (sm_90a only). No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/types.cuh"

namespace gemm {

enum class Epilogue : int {
    kPlain = 0,     // out = x weight^T
    kResidual = 1,  // out = residual + x weight^T, rounded once
    kSwiglu = 2,    // weight rows: 8 gates, their 8 ups, the next 8 gates, ...; out = silu(gate) * up, half as wide
};

// x [num_tokens, size], weight [num_rows, size], out and residual [num_tokens, num_rows] (kSwiglu: out [num_tokens,
// num_rows / 2]); all contiguous and 16-byte aligned. Any num_tokens; num_rows and size are multiples of 8, with
// kSwiglu num_rows of 16.
struct Gemm {
    const void *x, *weight, *residual;
    void* out;
    int num_tokens, num_rows, size;
    Epilogue epilogue;
};

// How it is computed: weight rows of a tile; in how many parts its inner dimension is split, each worked on by a
// cluster of its own, all at the same time; tokens of a block's tile.
struct Plan {
    int rows, splits, tokens;
};

// For products in parts: aligned to 16 bytes, zeroed before its first use and left fit for the next, and never used by
// two products at the same time.
struct Workspace {
    void* data;
    int64_t bytes;
};

// Enough for any product on a GPU that runs so many clusters of two blocks at once.
int64_t workspace_bytes(int clusters);

struct Launch {
    common::Dtype dtype;
    cudaStream_t stream;
};

// On one device products run one after the other: they share what says which tiles are taken.
// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails.
void launch(const Gemm& g, const Plan& plan, const Workspace& workspace, const Launch& how);

}  // namespace gemm
