// Cached keys and values of several sequences, packed end to end: what library attention kernels read when a prompt
// continues behind tokens that are cached already. A block is one token; its threads copy all its heads.
#include "common/launch.h"
#include "common/require.h"
#include "elementwise/launch.h"

namespace elementwise {

static constexpr int kThreads = 128;

static __global__ void __launch_bounds__(kThreads) gather_cache_kernel(GatherCache p) {
    const int token = blockIdx.x;
    int low = 0, high = p.num_seqs - 1;  // the last sequence that starts at or before this token
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (p.starts[middle] <= token) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int position = token - p.starts[low];
    const int head_chunks = p.head_dim / kChunk;
    const int64_t block = int64_t(p.slots[low]) * p.blocks_per_slot + position / kBlockSize;
    const int64_t source = (block * p.num_kv_heads * kBlockSize + position % kBlockSize) * head_chunks;
    const int64_t target = int64_t(token) * p.num_kv_heads * head_chunks;
    for (int i = threadIdx.x; i < p.num_kv_heads * head_chunks; i += kThreads) {
        const int64_t from = source + int64_t(i / head_chunks) * kBlockSize * head_chunks + i % head_chunks;
        static_cast<uint4*>(p.k)[target + i] = static_cast<const uint4*>(p.k_cache)[from];
        static_cast<uint4*>(p.v)[target + i] = static_cast<const uint4*>(p.v_cache)[from];
    }
}

void gather_cache(const GatherCache& p, const Launch& how) {
    common::require(p.head_dim % kChunk == 0,
                    "head_dim is " + std::to_string(p.head_dim) + "; expected a multiple of 8");
    common::require(p.num_seqs >= 1 && p.num_tokens >= 1, "there are no tokens");
    common::require_aligned(p.k_cache, "k_cache"), common::require_aligned(p.v_cache, "v_cache"),
        common::require_aligned(p.k, "k"), common::require_aligned(p.v, "v");
    common::launch(gather_cache_kernel, p.num_tokens, kThreads, 0, how.stream, false, p);
}

}  // namespace elementwise
