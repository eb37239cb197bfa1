// The host side: checks, shared-memory plan, tensor maps, launch. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include "decode_attn/params.h"

namespace decode_attn {

// Which kernel runs: the steps of the ladder, slowest first. kTma needs compute capability 9.0.
enum class Version : int { kNaive = 0, kSplit = 1, kTensorCore = 2, kRing = 3, kTma = 4 };

struct Launch {
    common::Dtype dtype;
    int head_dim;
    int num_blocks;  // of the caches
    bool fused;
    bool pdl;  // programmatic dependent launch
    int grid;  // thread blocks; `partials` has room for as many
    Version version;
    cudaStream_t stream;
};

// Floats of `partials` that a launch needs. Before the first launch of kRing or kTma all of a range's are kEmptyWord
// but the last four, which are 0 (merge.cuh); all ranges see every launch, whatever its grid.
int64_t workspace_floats(Version version, int batch, int num_heads, int num_kv_heads, int head_dim, int grid);

// The most rows of a kRing or kTma launch on a GPU whose blocks may have `shared_bytes` of shared memory.
int max_batch(int head_dim, int shared_bytes);

// Throws std::invalid_argument for what the kernels do not support (before any CUDA call), std::runtime_error if CUDA
// fails. `params.stages` is chosen here.
void launch(Params params, const Launch& how);

}  // namespace decode_attn
