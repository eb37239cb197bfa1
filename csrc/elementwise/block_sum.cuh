// A sum over the threads of a block, which every thread receives.
#pragma once

namespace elementwise {

constexpr int kMaxThreads = 512;

static __device__ __forceinline__ float sum_over_block(float value) {
    __shared__ float partial[kMaxThreads / 32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    const int warps = blockDim.x / 32;
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < warps; ++i) value += partial[i];  // every thread in the same order: one scale for the row
    return value;
}

}  // namespace elementwise
