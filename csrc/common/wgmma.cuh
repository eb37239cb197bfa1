// What asynchronous matrix products of a warpgroup (wgmma, sm_90a) need around them, whatever their size.
//
// Operands lie in shared memory as rows of 64 elements (128 bytes) along the inner dimension, the 16-byte chunk c of
// row r at c ^ (r % 8): what the copy engine's 128-byte swizzle writes. Groups of 8 rows (1024 bytes, aligned to as
// much) follow each other.
#pragma once
#include <cstdint>

namespace common {

// Descriptor of an operand: its address and the 1024 bytes between row groups in units of 16 bytes, and the swizzle.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
    constexpr uint64_t kGroupStride = uint64_t(1024 / 16) << 32, kIgnored = uint64_t(1) << 16;
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return (uint64_t(address & 0x3FFFF) >> 4) | kIgnored | kGroupStride | kSwizzle128;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `kPending` committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace common
