// silu(gate) * up over the packed gate-up projection. A thread makes one 16-byte chunk of output from 8 gates and the 8
// ups that lie right behind them.
#include "common/async.cuh"
#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/require.h"
#include "elementwise/launch.h"

namespace elementwise {

static constexpr int kThreads = 256;
static constexpr int kPerThread = 2;  // chunks of output, their loads in flight together

// gate_up: `groups` groups of 8 gates and 8 ups; out: 8 results a group. Rows do not matter: a row is whole groups.
template <typename T>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const uint4* gate_up, uint4* out, int64_t groups) {
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    const int64_t first = int64_t(blockIdx.x) * kThreads * kPerThread + threadIdx.x;
    uint4 gate[kPerThread], up[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t at = first + i * kThreads;
        if (at < groups) gate[i] = gate_up[2 * at], up[i] = gate_up[2 * at + 1];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t at = first + i * kThreads;
        if (at >= groups) break;
        float g[8], u[8];
        common::to_floats<T>(gate[i], g);
        common::to_floats<T>(up[i], u);
#pragma unroll
        for (int j = 0; j < 8; ++j) u[j] *= __fdividef(g[j], 1 + __expf(-g[j]));
        out[at] = common::from_floats<T>(u);
    }
}

void silu_mul(const SiluMul& p, const Launch& how) {
    common::require(p.size % kChunk == 0 && p.size >= kChunk,
                    "size is " + std::to_string(p.size) + "; expected a multiple of 8");
    common::require(p.num_rows >= 1, "there are no rows");
    common::require_aligned(p.gate_up, "gate_up"), common::require_aligned(p.out, "out");
    const int64_t groups = p.num_rows * (p.size / kChunk);
    auto* kernel = how.dtype == common::Dtype::kBFloat16 ? silu_mul_kernel<__nv_bfloat16> : silu_mul_kernel<__half>;
    const int64_t blocks = (groups + kThreads * kPerThread - 1) / (kThreads * kPerThread);
    common::launch(kernel, dim3(blocks), kThreads, 0, how.stream, how.overlap, static_cast<const uint4*>(p.gate_up),
                   static_cast<uint4*>(p.out), groups);
}

}  // namespace elementwise
