// What the blocks of a cluster send each other, through shared memory (sm_90).
#pragma once
#include <cstdint>

namespace common {

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Nothing but the initialised barriers has to be seen by the other blocks, and they are fenced: a release would cost a
// microsecond.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in the cluster's window, of what lies at `address` in block `rank`'s shared memory.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// For what orders no stores of this thread's before others' accesses: a release to the cluster would be a fence of the
// whole GPU, half a microsecond.
__device__ __forceinline__ void arrive_remote(uint32_t barrier, int count = 1) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Stores into another block's shared memory; its barrier counts the bytes.
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, float a, float b, float c, float d) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
            address),
        "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
        : "memory");
}

__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, float v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %2, [%1];" ::"r"(address),
                 "r"(barrier), "f"(v)
                 : "memory");
}

// Waits for a phase of a barrier that other blocks arrive on or send to.
__device__ __forceinline__ void wait_for_cluster(uint32_t barrier, uint32_t parity = 0) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
            "p;}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

}  // namespace common
