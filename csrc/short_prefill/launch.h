// The host side of attention for short prompts: checks and launch. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kv_cache.h"
#include "common/types.cuh"

namespace short_prefill {

constexpr int kMaxTokens = 128;  // of a prompt
constexpr int kBlocksPerSM = 3;  // thread blocks that fit a multiprocessor

// num_seqs prompts end to end, prompt i being tokens starts[i] .. starts[i + 1] - 1, of which none has more than
// max_tokens; nothing is cached before them. qkv [T, num_heads + 2 num_kv_heads, head_dim], out [T, num_heads,
// head_dim]. Keys and values go to positions 0, 1, ... of slot slots[t] of the prompt's tokens t; those of a token
// with negative positions[t] are stored nowhere.
struct Params {
    const void* qkv;
    const float *cos, *sin;  // [num_positions, head_dim / 2]; tokens beyond turn like the last one, but are padding
    const int64_t *slots, *positions;
    const int* starts;              // [num_seqs + 1]
    void *out, *k_cache, *v_cache;  // caches [num_blocks, num_kv_heads, 64, head_dim], contiguous
    int num_seqs, max_tokens, num_positions, num_heads, num_kv_heads, blocks_per_slot;
    int block_heads;  // query heads that one thread block takes, of those that share a kv head
    constexpr int group() const { return num_heads / num_kv_heads; }
    constexpr int shares() const { return (group() + block_heads - 1) / block_heads; }  // thread blocks of a kv head
};

struct Launch {
    common::Dtype dtype;
    int head_dim;
    bool overlap;  // programmatic dependent launch
    cudaStream_t stream;
};

// Throws std::invalid_argument for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA
// fails.
void launch(const Params& p, const Launch& how);

}  // namespace short_prefill
