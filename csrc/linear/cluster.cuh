// Bulk tensor copies, and what blocks of a cluster do with each other's shared memory (sm_90).
#pragma once
#include <cuda.h>

#include <cstdint>

namespace linear {

constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // the encodings of createpolicy.fractional.L2
constexpr uint64_t kEvictLast = 0x14F0000000000000;

__device__ __forceinline__ void copy_2d(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
            target),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}

// The same box to the same place in every block of the cluster whose bit is set in `blocks`; each one's barrier counts it.
__device__ __forceinline__ void copy_2d_to_blocks(uint32_t target, const CUtensorMap* map, uint32_t barrier, int column, int row, int blocks,
                                                  uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(static_cast<uint16_t>(blocks)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint4& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones by copy engine and tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster that have not exited.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in the cluster's window, of what lies at `address` in block `rank`'s shared memory.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Arrives on a barrier of another block (or this one).
__device__ __forceinline__ void arrive_in_block(uint32_t cluster_address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

__device__ __forceinline__ float4 load_float4(uint32_t cluster_address) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(cluster_address) : "memory");
    return x;
}

__device__ __forceinline__ float load_float(uint32_t cluster_address) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(cluster_address) : "memory");
    return x;
}

}  // namespace linear
