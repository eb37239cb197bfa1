// Asynchronous copies into shared memory and the barriers that say when they are done.
// mbarrier and cp.async exist from sm_80; the tensor copy engine (TMA) and programmatic launch from sm_90.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace common {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // the encodings of createpolicy.fractional.L2
constexpr uint64_t kEvictLast = 0x14F0000000000000;

// ---- mbarrier: a phase ends when `count` arrivals (and, with TMA, the announced bytes) are in; `parity` names the
// phase.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#endif
    }
}

// A stage of a ring, and the parity of its current round.
struct Cursor {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// ---- cp.async: 16 or 4 bytes a thread. The arrival counts as one of the barrier's `count` once this thread's copies
// have landed. Or copies are counted in groups: a wait is over when at most kOpen of the thread's groups are on their
// way.
__device__ __forceinline__ void cp_async_16(uint32_t target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_4(uint32_t target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kOpen>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before those of the tensor cores and the copy engine.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The whole warp has read what it needs of a stage that the copy engine will write again. Without the fence the arrival
// does not wait for loads that are still under way, and the copy can overtake them.
__device__ __forceinline__ void release_stage(uint32_t empty, int lane) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
}

// The same at less cost: `results` depend on every value that was read, and the arrival's address on them. For grids of
// one block in z.
template <typename... Results>
__device__ __forceinline__ void release_stage_behind(uint32_t empty, int lane, Results... results) {
    const uint32_t zero = gridDim.z - 1;  // which the compiler does not know
    const uint32_t behind = (__float_as_uint(results) | ...) & zero;
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + behind);
}

// True in one lane of a warp whose lanes are all here. The compiler knows that it is one: instructions that take their
// operands from uniform registers then need no loop over the lanes, as they do behind `lane == 0`.
__device__ __forceinline__ bool elect_one() {
#if __CUDA_ARCH__ >= 900
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
    return elected;
#else
    return threadIdx.x % 32 == 0;
#endif
}

// What is the same for all lanes of a warp, and the compiler knows: it stays in a uniform register. Of a shared address
// it would else know a way to make it anew in every round of a loop.
__device__ __forceinline__ uint32_t uniform(uint32_t value) {
    return __shfl_sync(~0u, value, 0);
}

// The number of this warp, and the compiler knows that it is the same for all lanes, and small.
__device__ __forceinline__ int uniform_warp() {
    return uniform(threadIdx.x / 32) % 32;
}

// ---- named barriers over `threads` threads of the block
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- programmatic dependent launch; both do nothing in a kernel that was launched without it
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- TMA
// Makes freshly initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Arrives once on `barrier` and announces `bytes` that copies will deliver.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

// A box of a panel_map (tensor_map.h), from this row and panel on.
__device__ __forceinline__ void tma_load_panels(uint32_t target, const CUtensorMap* map, uint32_t barrier, int row,
                                                int panel, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(panel), "l"(policy)
        : "memory");
#endif
}

// One box of a 5-D tensor, read once: it leaves L2 first.
__device__ __forceinline__ void tma_load_5d(uint32_t target, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                                            int c2, int c3, int c4) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(target),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(kEvictFirst)
        : "memory");
#endif
}

}  // namespace common
