// Rows of the embedding table, and what the norm behind them starts from. A block is one row, in one pass.
#include <algorithm>

#include "common/async.cuh"
#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/require.h"
#include "elementwise/block_sum.cuh"
#include "elementwise/launch.h"

namespace elementwise {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) embed_kernel(Embed p) {
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    const int chunks = p.hidden_size / kChunk;
    const uint4* from = static_cast<const uint4*>(p.table) + p.token_ids[blockIdx.x] * chunks;
    uint4* to = static_cast<uint4*>(p.out) + int64_t(blockIdx.x) * chunks;
    float squares = 0;
#pragma unroll 4
    for (int at = threadIdx.x; at < chunks; at += blockDim.x) {
        const uint4 chunk = __ldg(from + at);
        to[at] = chunk;
        float values[8];
        common::to_floats<T>(chunk, values);
#pragma unroll
        for (float value : values) squares += value * value;
    }
    if (!p.squares) return;
    squares = sum_over_block(squares);
    if (threadIdx.x == 0) p.squares[blockIdx.x] = squares;
}

void embed(const Embed& p, const Launch& how) {
    common::require(p.hidden_size % kChunk == 0 && p.hidden_size >= kChunk,
                    "hidden_size is " + std::to_string(p.hidden_size) + "; expected a multiple of 8");
    common::require(p.num_tokens >= 1, "there are no tokens");
    common::require_aligned(p.table, "table"), common::require_aligned(p.out, "out");
    auto* kernel = how.dtype == common::Dtype::kBFloat16 ? embed_kernel<__nv_bfloat16> : embed_kernel<__half>;
    const int threads = std::min(kMaxThreads, (p.hidden_size / kChunk + 31) / 32 * 32);
    common::launch(kernel, p.num_tokens, threads, 0, how.stream, how.overlap, p);
}

}  // namespace elementwise
