// Prefill's way from the packed projection to attention and cache: one read of qkv, q and k rotated in fp32 (half-split
// layout: element i turns with element i + head_dim / 2), k and v stored in their blocks. A block is one token; a
// thread keeps one chunk of cosines and sines and walks over the heads with it.
#include "common/async.cuh"
#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/require.h"
#include "elementwise/launch.h"

namespace elementwise {

static constexpr int kThreads = 128;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppend p) {
    constexpr int kHalf = kHeadDim / 2 / kChunk;  // chunks in half a head
    constexpr int kHeadChunks = 2 * kHalf;
    const int pair = threadIdx.x % kHalf;  // chunks `pair` and `pair + kHalf` turn together
    const int token = blockIdx.x;
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    const int64_t position = p.positions[token], slot = p.slots[token];
    const bool active = position >= 0;

    const common::Angles angles(p.cos, p.sin, (active ? position : 0) * (kHeadDim / 2) + pair * kChunk);
    const int rotated_heads = p.num_heads + p.num_kv_heads, all_heads = rotated_heads + p.num_kv_heads;
    const uint4* qkv = static_cast<const uint4*>(p.qkv) + int64_t(token) * all_heads * kHeadChunks;
    uint4* rotated = static_cast<uint4*>(p.rotated) + int64_t(token) * rotated_heads * kHeadChunks;
    const int64_t block = slot * p.blocks_per_slot + position / kBlockSize;
    const int64_t cache_row = (block * p.num_kv_heads * kBlockSize + position % kBlockSize) * kHeadChunks;
    constexpr int64_t kCacheHead = int64_t(kBlockSize) * kHeadChunks;

#pragma unroll 4
    for (int head = threadIdx.x / kHalf; head < all_heads; head += kThreads / kHalf) {
        uint4 low = qkv[head * kHeadChunks + pair], high = qkv[head * kHeadChunks + pair + kHalf];
        if (head < rotated_heads) {
            common::rotate<T>(low, high, angles);
            rotated[head * kHeadChunks + pair] = low, rotated[head * kHeadChunks + pair + kHalf] = high;
        }
        if (head >= p.num_heads && active) {
            const bool is_key = head < rotated_heads;
            uint4* cache = static_cast<uint4*>(is_key ? p.k_cache : p.v_cache) + cache_row +
                           (head - (is_key ? p.num_heads : rotated_heads)) * kCacheHead;
            cache[pair] = low, cache[pair + kHalf] = high;
        }
    }
}

void rope_append(const RopeAppend& p, const Launch& how) {
    common::require(p.head_dim == 64 || p.head_dim == 128,
                    "head_dim is " + std::to_string(p.head_dim) + "; supported: 64, 128");
    common::require(p.num_tokens >= 1, "there are no tokens");
    common::require(p.num_heads >= 1 && p.num_kv_heads >= 1 && p.blocks_per_slot >= 1,
                    "num_heads, num_kv_heads and blocks_per_slot must be at least 1");
    common::require_aligned(p.qkv, "qkv"), common::require_aligned(p.rotated, "rotated");
    common::require_aligned(p.cos, "cos"), common::require_aligned(p.sin, "sin");
    common::require_aligned(p.k_cache, "k_cache"), common::require_aligned(p.v_cache, "v_cache");
    const bool bf16 = how.dtype == common::Dtype::kBFloat16;
    auto* kernel = p.head_dim == 64 ? (bf16 ? rope_append_kernel<__nv_bfloat16, 64> : rope_append_kernel<__half, 64>)
                                    : (bf16 ? rope_append_kernel<__nv_bfloat16, 128> : rope_append_kernel<__half, 128>);
    common::launch(kernel, p.num_tokens, kThreads, 0, how.stream, how.overlap, p);
}

}  // namespace elementwise
