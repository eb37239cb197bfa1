// The stream of weights and cached keys and values through shared memory.
//
// Loader threads copy every chunk that the block will multiply in this launch, in order and without waiting for any
// activation, because weights are constants: memory stays busy while the math warps wait for other blocks. Chunk n lies
// in slot n % num_slots. One thread is too slow: between two copies it goes through several dependent waits and loads,
// a good thousand cycles, in which memory delivers more than a chunk. So kLoaders threads of different warps take
// turns.
#pragma once
#include "common/async.cuh"
#include "decode_step/packet.cuh"

namespace decode_step {

struct RingBarriers {
    uint64_t full[kRingSlots], empty[kRingSlots];
    uint32_t exchanging;  // whether the math warps wait for other blocks, or soon will
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

// Where the ring is: shared addresses and bytes.
struct Ring {
    uint32_t base, full, empty, num_slots, slot_bytes;
};

// A position in the stream of chunks: its slot, and which use of the slot it is.
struct RingPosition {
    uint32_t slot = 0, round = 0;
    __device__ __forceinline__ void advance(uint32_t chunks, const Ring& ring) {
        slot += chunks;
        while (slot >= ring.num_slots) slot -= ring.num_slots, ++round;
    }
};

// One math warp's view.
struct RingReader {
    Ring ring;
    RingPosition next, oldest;  // to acquire, to release

    // Whether the next chunk is here already; asked early, the answer costs no waiting.
    __device__ __forceinline__ bool peek() const { return test_phase(ring.full + next.slot * 8, next.round & 1); }

    // Waits for the next chunk and returns its shared address. `here`: peek() has said yes.
    __device__ __forceinline__ uint32_t acquire(bool here = false) {
        if (!here) wait_phase(ring.full + next.slot * 8, next.round & 1);
        const uint32_t address = ring.base + next.slot * ring.slot_bytes;
        next.advance(1, ring);
        return address;
    }
    // The whole warp has read what it needs of the oldest chunk that it acquired.
    __device__ __forceinline__ void release(int lane) {
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(ring.empty + oldest.slot * 8);
        oldest.advance(1, ring);
    }
};

// One of kLoaders threads; it takes chunks own, own + kLoaders, ... of the stream.
//
// The ring holds much more than what may be under way at once: beyond what keeps memory busy, requests only queue up in
// the memory system, and the polls of all blocks queue behind them. So less is under way while an exchange is near.
struct RingLoader {
    Ring ring;
    volatile const uint32_t* exchanging;
    uint32_t max_streaming, max_exchanging;  // chunks under way
    uint32_t own;                            // number of this thread's next chunk
    RingPosition position;                   // and where it goes
    uint32_t first = 0;                      // number of the first chunk of the run at hand

    __device__ __forceinline__ RingLoader(const Ring& ring, volatile const uint32_t* exchanging, uint32_t max_streaming,
                                          uint32_t max_exchanging, uint32_t own)
        : ring(ring), exchanging(exchanging), max_streaming(max_streaming), max_exchanging(max_exchanging), own(own) {
        position.advance(own, ring);
    }

    // The next `count` chunks of the stream; issue(c, target, barrier) starts the copies of the c-th of them.
    template <typename Issue>
    __device__ __forceinline__ void run(uint32_t count, Issue&& issue) {
        while (own < first + count) {
            const uint32_t barrier = ring.full + position.slot * 8;
            wait_phase(ring.empty + position.slot * 8, (position.round & 1) ^ 1);
            wait_in_flight(*exchanging ? max_exchanging : max_streaming);
            issue(own - first, ring.base + position.slot * ring.slot_bytes, barrier);
            own += kLoaders;
            position.advance(kLoaders, ring);
        }
        first += count;
    }

    // Waits until the chunk `limit` before this one has landed. Another loader may be so far ahead that its slot is in
    // use again, and its full barrier a phase further; but then it has been released, and its empty barrier is not.
    __device__ __forceinline__ void wait_in_flight(uint32_t limit) {
        if (own < limit || limit >= ring.num_slots) return;
        const bool wraps = position.slot < limit;
        const uint32_t slot = position.slot - limit + (wraps ? ring.num_slots : 0),
                       parity = (position.round - wraps) & 1;
        Watchdog watchdog;
        while (!try_phase(ring.full + slot * 8, parity) && !test_phase(ring.empty + slot * 8, parity)) watchdog.check();
    }
};

__device__ __forceinline__ void copy_in(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
    constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // createpolicy.fractional.L2::evict_first
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(target),
        "l"(source), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
        : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
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
