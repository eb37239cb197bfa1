// The stream of weights and cached keys and values through shared memory.
//
// One thread of the block copies every chunk that the block will multiply in this launch, in order and without waiting
// for any activation, because weights are constants: memory stays busy while the math warps wait for other blocks.
// Chunk n lies in slot n % num_slots.
#pragma once
#include "common/async.cuh"
#include "decode_step/packet.cuh"

namespace decode_step {

struct RingBarriers {
    uint64_t full[kMaxSlots], empty[kMaxSlots];
    uint32_t exchanging;  // whether the math warps wait for other blocks, or soon will
};

__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
    Watchdog watchdog;
    uint32_t done;
    for (;;) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (done) return;
        watchdog.check();
    }
}

// Where the ring is: shared addresses.
struct Ring {
    uint32_t base, full, empty, num_slots;
};

// A slot, and the parity of its use.
struct RingPosition {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void advance(const Ring& ring) {
        const bool wraps = ++slot == ring.num_slots;
        slot = wraps ? 0 : slot;
        parity ^= wraps;
    }
};

// One math warp's view.
struct RingReader {
    Ring ring;
    RingPosition next;    // to acquire
    uint32_t oldest = 0;  // slot to release

    // Waits for the next chunk and returns its shared address.
    __device__ __forceinline__ uint32_t acquire() {
        wait_phase(ring.full + next.slot * 8, next.parity);
        const uint32_t address = ring.base + next.slot * kSlotBytes;
        next.advance(ring);
        return address;
    }
    // The whole warp has read what it needs of the oldest chunk that it acquired.
    __device__ __forceinline__ void release(int lane) {
        common::release_stage(ring.empty + oldest * 8, lane);
        if (++oldest == ring.num_slots) oldest = 0;
    }
};

// The ring holds more than what may be under way at once: beyond what keeps memory busy, requests only queue up in the
// memory system, and the polls of all blocks queue behind them. So less is under way while an exchange is near.
struct RingLoader {
    Ring ring;
    uint32_t max_streaming, max_exchanging;  // chunks under way, less than num_slots
    volatile const uint32_t* exchanging;
    RingPosition next;

    // Waits until a chunk of `bytes` may be requested; its copies go to target() and must be followed by advance().
    __device__ __forceinline__ void reserve(uint32_t bytes) {
        wait_phase(ring.empty + next.slot * 8, next.parity ^ 1);
        const uint32_t limit = *exchanging ? max_exchanging : max_streaming;
        const bool wraps = next.slot < limit;
        wait_phase(ring.full + (next.slot - limit + (wraps ? ring.num_slots : 0)) * 8, next.parity ^ wraps);
        common::mbarrier_expect(ring.full + next.slot * 8, bytes);
    }
    __device__ __forceinline__ uint32_t target() const { return ring.base + next.slot * kSlotBytes; }
    __device__ __forceinline__ void copy(uint32_t target, const void* source, uint32_t bytes) const {
        constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // createpolicy.fractional.L2::evict_first
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(target),
            "l"(source), "r"(bytes), "r"(ring.full + next.slot * 8), "l"(kEvictFirst)
            : "memory");
    }
};

// Keeps a value in a register: the compiler may not fetch it again from where it came.
__device__ __forceinline__ int pinned(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ float bf16_low(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float bf16_high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void unpack(uint4 v, float (&out)[8]) {
    out[0] = bf16_low(v.x), out[1] = bf16_high(v.x), out[2] = bf16_low(v.y), out[3] = bf16_high(v.y);
    out[4] = bf16_low(v.z), out[5] = bf16_high(v.z), out[6] = bf16_low(v.w), out[7] = bf16_high(v.w);
}

}  // namespace decode_step
