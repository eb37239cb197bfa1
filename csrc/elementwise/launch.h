// The host side of the elementwise kernels: checks and launches. No torch, no allocation, no synchronisation.
//
// All of them move 16-byte chunks: pointers are 16-byte aligned, and row lengths are multiples of 8 elements.
#pragma once
#include <cuda_runtime_api.h>

#include "common/kv_cache.h"
#include "common/types.cuh"

namespace elementwise {

using common::kBlockSize, common::kChunk;

struct Launch {
    common::Dtype dtype;
    bool overlap;  // programmatic dependent launch
    cudaStream_t stream;
};

// table [vocab_size, hidden_size] -> out [num_tokens, hidden_size], and the sum of squares of each of its rows, squares
// [num_tokens], unless null.
struct Embed {
    const int64_t* token_ids;  // [num_tokens]
    const void* table;
    void* out;
    float* squares;
    int num_tokens, hidden_size;
};

// x, out [num_rows, hidden_size], weight [hidden_size] or null. With squares [num_rows] in place of out, only each
// row's sum of squares is wanted.
struct RmsNorm {
    const void *x, *weight;
    void* out;
    int num_rows, hidden_size;
    float eps;
    float* squares;
};

// gate_up [num_rows, 2 * size]: 8 gates, their 8 ups, the next 8 gates, ...; out [num_rows, size].
struct SiluMul {
    const void* gate_up;
    void* out;
    int64_t num_rows;
    int size;
};

// qkv [num_tokens, num_heads + 2 num_kv_heads, head_dim]; rotated [num_tokens, num_heads + num_kv_heads, head_dim]
// receives the rotated q and k heads; k and v of token i go to position positions[i] of slot slots[i] (a negative
// position: nowhere).
struct RopeAppend {
    const void* qkv;
    const float *cos, *sin;  // [positions, head_dim / 2]
    const int64_t *slots, *positions;
    void *rotated, *k_cache, *v_cache;  // caches [num_blocks, num_kv_heads, 64, head_dim], contiguous
    int num_tokens, num_heads, num_kv_heads, head_dim, blocks_per_slot;
};

// Positions 0 .. starts[i + 1] - starts[i] - 1 of slot slots[i], for each of num_seqs sequences, to k, v
// [starts[num_seqs], num_kv_heads, head_dim].
struct GatherCache {
    const void *k_cache, *v_cache;
    const int *slots, *starts;
    void *k, *v;
    int num_seqs, num_tokens, num_kv_heads, head_dim, blocks_per_slot;
};

// Each throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if
// CUDA fails.
void embed(const Embed& p, const Launch& how);
void rms_norm(const RmsNorm& p, const Launch& how);
void silu_mul(const SiluMul& p, const Launch& how);
void rope_append(const RopeAppend& p, const Launch& how);
void gather_cache(const GatherCache& p, const Launch& how);

}  // namespace elementwise
