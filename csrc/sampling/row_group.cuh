// The thread blocks that share a row: a cluster where the GPU has clusters, else a single block.
//
// They exchange 64-bit messages by asynchronous stores that complete on the receiver's mbarrier. A cluster barrier with
// memory ordering would do too, but it waits for a fence of the whole GPU and drops all of L1, where the slices of the
// row lie.
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

// Of numbers below 2^63: by three parts of 21 bits, whose sums fit into 32 bits. One instruction a part, not ten
// shuffles.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    constexpr uint32_t kPart = (1u << 21) - 1;
    const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x) & kPart);
    const uint64_t middle = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> 21) & kPart);
    const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> 42));
    return low + (middle << 21) + (high << 42);
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
    // Once this thread's initialised mbarriers may be seen by the others; `meet` returns when all have arrived.
    __device__ __forceinline__ void arrive() const {
        common::fence_barrier_init();
#if __CUDA_ARCH__ >= 900
        if (size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void meet() const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    // Stores to the variable of block `other` that has the address of this block's `slot`; counts on its `mailbox`.
    __device__ __forceinline__ void send(uint64_t* slot, uint64_t* mailbox, uint32_t other, uint64_t message) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(
                         address(slot, other)),
                     "l"(message), "r"(address(mailbox, other))
                     : "memory");
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
    uint64_t warps[kWarps], blocks[kMaxBlocksPerRow], mailbox;

    // By one thread, before RowGroup::arrive.
    __device__ void init() { common::mbarrier_init(common::shared_address(&mailbox), 1); }

    // Every thread gives its candidate; synchronises the block.
    __device__ __forceinline__ void publish(const RowGroup& group, uint64_t mine) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        mine = warp_max(mine);
        if (lane == 0) warps[warp] = mine;
        __syncthreads();
        if (warp == 0 && group.size > 1) {
            const uint64_t best = warp_max(lane < kWarps ? warps[lane] : 0);
            if (lane == 0) common::mbarrier_expect(common::shared_address(&mailbox), group.size * sizeof(uint64_t));
            if (lane < group.size) group.send(&blocks[group.rank], &mailbox, lane, best);
        }
    }
    // Waits for all blocks.
    __device__ __forceinline__ uint64_t collect(const RowGroup& group) const {
        const int lane = threadIdx.x % 32;
        if (group.size == 1) return warp_max(lane < kWarps ? warps[lane] : 0);
        common::mbarrier_wait(common::shared_address(&mailbox), 0);
        return warp_max(lane < group.size ? blocks[lane] : 0);
    }
};

}  // namespace sampling
