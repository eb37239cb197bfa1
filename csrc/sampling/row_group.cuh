// The thread blocks that share a row: a cluster where the GPU has clusters, else a single block.
#pragma once
#include "common/async.cuh"
#include "sampling/ordering.cuh"
#include "sampling/params.h"

namespace sampling {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
    const uint32_t high = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(x >> 32));
    const uint32_t mine = static_cast<uint32_t>(x >> 32) == high ? static_cast<uint32_t>(x) : 0;
    return static_cast<uint64_t>(high) << 32 | __reduce_max_sync(kAllLanes, mine);
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
}

__device__ __forceinline__ uint64_t warp_inclusive_sum(uint64_t x, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t lower = __shfl_up_sync(kAllLanes, x, distance);
        if (lane >= distance) x += lower;
    }
    return x;
}

struct RowGroup {
    uint32_t rank, size;

    __device__ static RowGroup here() {
        RowGroup group{0, 1};
#if __CUDA_ARCH__ >= 900
        asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(group.rank));
        asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(group.size));
#endif
        return group;
    }
    // All threads of all blocks; what one wrote to shared memory before, all can read after.
    __device__ __forceinline__ void sync() const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) {
            asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
            return;
        }
#endif
        __syncthreads();
    }
    // The variable of block `other` that has the address of this block's `mine`.
    __device__ __forceinline__ uint64_t load(const uint64_t* mine, uint32_t other) const {
#if __CUDA_ARCH__ >= 900
        uint64_t value;
        asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address(mine, other)) : "memory");
        return value;
#else
        return *mine;
#endif
    }
    __device__ __forceinline__ uint32_t load(const uint32_t* mine, uint32_t other) const {
#if __CUDA_ARCH__ >= 900
        uint32_t value;
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address(mine, other)) : "memory");
        return value;
#else
        return *mine;
#endif
    }
    __device__ __forceinline__ void store(uint64_t* mine, uint32_t other, uint64_t value) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address(mine, other)), "l"(value) : "memory");
#else
        *mine = value;
#endif
    }

  private:
    __device__ __forceinline__ static uint32_t address(const void* mine, uint32_t other) {
        uint32_t remote = common::shared_address(mine);
#if __CUDA_ARCH__ >= 900
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(remote), "r"(other));
#endif
        return remote;
    }
};

// The row's best candidate, known to all threads of the group. Use each instance once.
struct BestOfRow {
    uint64_t warps[kWarps], blocks[kMaxBlocksPerRow];

    __device__ uint64_t reduce(const RowGroup& group, uint64_t mine) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        mine = warp_max(mine);
        if (lane == 0) warps[warp] = mine;
        __syncthreads();
        if (warp == 0) {
            const uint64_t best = warp_max(lane < kWarps ? warps[lane] : 0);
            if (lane < group.size) group.store(&blocks[group.rank], lane, best);
        }
        group.sync();
        return warp_max(lane < group.size ? blocks[lane] : 0);
    }
};

}  // namespace sampling
