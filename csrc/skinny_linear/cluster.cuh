// Bulk tensor copies, and what the blocks of a cluster send each other (sm_90).
#pragma once
#include <cuda.h>

#include <cstdint>

namespace skinny_linear {

constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // the encodings of createpolicy.fractional.L2
constexpr uint64_t kEvictLast = 0x14F0000000000000;

// A box of a matrix seen as (column in a panel of 64, row, panel).
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int row, int panel,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(panel), "l"(policy)
        : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of the cluster has come this far, and sees the barriers that others initialised.
__device__ __forceinline__ void cluster_sync() {
    // Nothing but the initialised barriers has to be seen, and they are fenced: a release would cost a microsecond.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in the cluster's window, of what lies at `address` in block `rank`'s shared memory.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Stores into another block's shared memory; its barrier counts the bytes.
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, const float* v) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
            address),
        "r"(barrier), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
        : "memory");
}

__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, float v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %2, [%1];" ::"r"(address),
                 "r"(barrier), "f"(v)
                 : "memory");
}

// Waits for phase 0 of a barrier on which other blocks' stores complete.
__device__ __forceinline__ void wait_for_sent(uint32_t barrier) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, "
            "p;}"
            : "=r"(done)
            : "r"(barrier)
            : "memory");
    }
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

}  // namespace skinny_linear
