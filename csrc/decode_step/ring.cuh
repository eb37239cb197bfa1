// The stream of weights and cached keys and values through shared memory.
//
// One thread of the block copies every chunk that the block will multiply in this launch, in order and without waiting
// for any activation, because weights are constants: memory stays busy while the math warps wait for other blocks.
// Chunks have different sizes, so the ring is one of bytes; a chunk that would cross its end starts at 0 again. Loader
// and readers derive the same offsets from the same sequence of sizes.
#pragma once
#include "common/async.cuh"
#include "decode_step/packet.cuh"

namespace decode_step {

#ifdef DECODE_STEP_PROFILE
#define PROFILE_TICK(name) const int64_t name = clock64()
#else
#define PROFILE_TICK(name)
#endif

struct RingBarriers {
    uint64_t full[kRingSlots], empty[kRingSlots];
    uint32_t began[kRingSlots];  // the loader's: stream position of each chunk
    uint32_t exchanging;         // whether the math warps wait for other blocks, or soon will
};

// Asks without waiting (try_wait would suspend the warp for a while).
__device__ __forceinline__ bool test_phase(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

__device__ __forceinline__ bool try_phase(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
    Watchdog watchdog;
    while (!try_phase(barrier, parity)) watchdog.check();
}

// One math warp's view.
struct RingReader {
    uint32_t base, full, empty, size;  // shared addresses, bytes
    uint32_t offset = 0, acquired = 0, released = 0;

    // Whether the next chunk is here already; asked early, the answer costs no waiting.
    __device__ __forceinline__ bool peek() const {
        return test_phase(full + (acquired % kRingSlots) * 8, (acquired / kRingSlots) & 1);
    }
    // Waits for the next chunk, of `bytes`, and returns its shared address. `here`: peek() has said yes.
    __device__ __forceinline__ uint32_t acquire(uint32_t bytes, bool here = false) {
        if (offset + bytes > size) offset = 0;
        if (!here) wait_phase(full + (acquired % kRingSlots) * 8, (acquired / kRingSlots) & 1);
        const uint32_t address = base + offset;
        offset += bytes;
        ++acquired;
        return address;
    }
    // The whole warp has read what it needs of the oldest chunk that it acquired.
    __device__ __forceinline__ void release(int lane) {
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(empty + (released % kRingSlots) * 8);
        ++released;
    }
};

// The ring holds much more than what may be under way at once: beyond what keeps memory busy, requests only queue up in
// the memory system, and the polls of all blocks queue behind them. So less is under way while an exchange is near.
struct RingLoader {
    uint32_t base, full, empty, size;  // shared addresses, bytes
    uint32_t max_streaming, max_exchanging;
    uint32_t* began;
    volatile const uint32_t* exchanging;
    int64_t* profile;
    uint32_t offset = 0, position = 0, head = 0, tail = 0, landed = 0;

    // Copies `bytes` of `source` into the next chunk, which takes `reserved` bytes of the ring. `idle(is_full)` is
    // called over and over while this waits for room or for earlier copies.
    template <typename Idle>
    __device__ __forceinline__ void push(const void* source, uint32_t bytes, uint32_t reserved, Idle&& idle) {
        if (offset + reserved > size) {
            position += size - offset;
            offset = 0;
        }
        PROFILE_TICK(t0);
        while (tail != head && (position + reserved - began[tail % kRingSlots] > size || head - tail == kRingSlots)) {
            wait_idly(empty + (tail % kRingSlots) * 8, (tail / kRingSlots) & 1, true, idle);
            if (landed == tail) ++landed;
            ++tail;
        }
        PROFILE_TICK(t1);
        while (landed != head &&
               position + reserved - began[landed % kRingSlots] > (*exchanging ? max_exchanging : max_streaming)) {
            wait_idly(full + (landed % kRingSlots) * 8, (landed / kRingSlots) & 1, false, idle);
            ++landed;
        }
        PROFILE_TICK(t2);
#ifdef DECODE_STEP_PROFILE
        profile[19] += t1 - t0, profile[22] += t2 - t1;
#endif
        began[head % kRingSlots] = position;
        const uint32_t barrier = full + (head % kRingSlots) * 8;
        common::mbarrier_expect(barrier, bytes);
        constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // createpolicy.fractional.L2::evict_first
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(base + offset),
            "l"(source), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
            : "memory");
        offset += reserved;
        position += reserved;
        ++head;
    }

    template <typename Idle>
    __device__ __forceinline__ static void wait_idly(uint32_t barrier, uint32_t parity, bool is_full, Idle&& idle) {
        Watchdog watchdog;
        while (!test_phase(barrier, parity)) {
            idle(is_full);
            watchdog.check();
        }
    }
};

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
