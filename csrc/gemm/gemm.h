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

struct Launch {
    common::Dtype dtype;
    cudaStream_t stream;
};

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails.
void launch(const Gemm& g, const Launch& how);

// How split.cuh cuts a product up.
struct Split {
    int rows;    // of weight, in a tile
    int splits;  // parts of the inner dimension
    int shared;  // blocks of 128 tokens that share a tile's weights
};

// Not with kSwiglu.
void launch_split(const Gemm& g, const Split& split, const Launch& how);

}  // namespace gemm
