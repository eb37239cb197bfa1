// RMSNorm in one pass: a block is one row, which stays in registers between the sum of squares and the scaling. Or the
// sum alone, for products that scale theirs (csrc/batch_linear/, csrc/gemm/).
#include "common/async.cuh"
#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/require.h"
#include "elementwise/block_sum.cuh"
#include "elementwise/launch.h"

namespace elementwise {

static constexpr int kMaxHidden = kMaxThreads * 4 * kChunk;

// x, out [gridDim.x, hidden_size]; weight [hidden_size]. Thread t holds chunks t, t + blockDim.x, ...: at most kChunks.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNorm p) {
    const int chunks = p.hidden_size / kChunk;
    const uint4* weight = static_cast<const uint4*>(p.weight);
    const uint4* x = static_cast<const uint4*>(p.x) + int64_t(blockIdx.x) * chunks;
    uint4* out = static_cast<uint4*>(p.out) + int64_t(blockIdx.x) * chunks;

    uint4 scale[kChunks], row[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        scale[i] = weight && at < chunks ? __ldg(weight + at) : uint4{};
    }
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        row[i] = at < chunks ? x[at] : uint4{};
    }
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        float values[8];
        common::to_floats<T>(row[i], values);
#pragma unroll
        for (float value : values) squares += value * value;
    }
    squares = sum_over_block(squares);
    if (p.squares) {
        if (threadIdx.x == 0) p.squares[blockIdx.x] = squares;
        return;
    }
    const float inverse = rsqrtf(squares / p.hidden_size + p.eps);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        float values[8], factors[8];
        common::to_floats<T>(row[i], values);
        common::to_floats<T>(scale[i], factors);
        // The Llama reference rounds the normed value before it multiplies by the weight.
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float2 rounded =
                common::Pack<T>::to_floats(common::Pack<T>::from_floats(values[j] * inverse, values[j + 1] * inverse));
            values[j] = weight ? rounded.x * factors[j] : rounded.x;
            values[j + 1] = weight ? rounded.y * factors[j + 1] : rounded.y;
        }
        if (at < chunks) out[at] = common::from_floats<T>(values);
    }
}

template <typename T>
static void launch_rms_norm(const RmsNorm& p, const Launch& how) {
    const int chunks = p.hidden_size / kChunk;
    // Enough threads that a short call is one load deep, few enough that a long one keeps many rows in flight.
    const int per_thread = chunks <= 64 ? 1 : chunks <= 256 ? 2 : 4;
    const int threads = ((chunks + per_thread - 1) / per_thread + 31) / 32 * 32;
    auto* kernel = per_thread == 1   ? rms_norm_kernel<T, 1>
                   : per_thread == 2 ? rms_norm_kernel<T, 2>
                                     : rms_norm_kernel<T, 4>;
    common::launch(kernel, p.num_rows, threads, 0, how.stream, how.overlap, p);
}

void rms_norm(const RmsNorm& p, const Launch& how) {
    common::require(p.hidden_size % kChunk == 0 && p.hidden_size >= kChunk && p.hidden_size <= kMaxHidden,
                    "hidden_size is " + std::to_string(p.hidden_size) + "; expected a multiple of 8, at most " +
                        std::to_string(kMaxHidden));
    common::require(p.num_rows >= 1, "there are no rows");
    common::require_aligned(p.x, "x"), common::require_aligned(p.weight, "weight"),
        common::require_aligned(p.out, "out");
    common::require(bool(p.out) != bool(p.squares), "the output is either the norm or the sums of squares");
    how.dtype == common::Dtype::kBFloat16 ? launch_rms_norm<__nv_bfloat16>(p, how) : launch_rms_norm<__half>(p, how);
}

}  // namespace elementwise
