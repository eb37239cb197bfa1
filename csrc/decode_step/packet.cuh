// Values that carry their own validity from one block to all others, without fence, flag or barrier.
//
// A tagged word is an fp32 whose two lowest mantissa bits hold the number of its use modulo 4 (2^-22 of its value, less
// than bf16 by 2^14). A reader polls the very words that it needs until each shows the tag of this use: one trip
// through L2 instead of store, fence, flag, poll, reload. Every word of a tagged buffer is written once a layer, so
// what it held before always differs. Words that are not written in every layer (context splits) are pairs of the value
// and the full 32-bit use instead, so that something old can never look new.
//
// Why nobody overwrites what another block still needs: use n + 1 of any buffer is computed from the residual stream
// after layer n, of which every block publishes a part (the grid has at most H blocks), and each block does so only
// after all its warps have gone through every operation of layer n, and each wait there ends with the words in
// registers.
#pragma once
#include <cstdint>

#include "decode_step/params.h"

namespace decode_step {

// A deadlock is a bug; it must end in an error, not in a hung GPU.
struct Watchdog {
    uint32_t spins = 0;
    __device__ __forceinline__ void check() {
        if (++spins == 1u << 24) __trap();  // some seconds
    }
};

__device__ __forceinline__ uint4 load_volatile(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t load_volatile(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ uint64_t load_volatile(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// Each of the two words arrives as a whole.
__device__ __forceinline__ ulonglong2 load_volatile(const ulonglong2* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void publish(uint32_t* p, float value, uint32_t use) {
    const uint32_t word = (__float_as_uint(value) & ~3u) | (use & 3u);
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}

__device__ __forceinline__ void publish(uint64_t* p, uint32_t value, uint32_t tag) {
    const uint64_t pair = (static_cast<uint64_t>(tag) << 32) | value;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(pair) : "memory");
}

__device__ __forceinline__ float untag(uint32_t word) {
    return __uint_as_float(word & ~3u);
}

__device__ __forceinline__ bool is_current(uint4 v, uint32_t use) {
    return ((((v.x ^ use) | (v.y ^ use)) | ((v.z ^ use) | (v.w ^ use))) & 3u) == 0;
}

__device__ __forceinline__ float await(const uint32_t* p, uint32_t use) {
    Watchdog watchdog;
    uint32_t word;
    while (((word = load_volatile(p)) ^ use) & 3u) {
        watchdog.check();
    }
    return untag(word);
}

// Polls N vectors of tagged words at address(0..N-1); the whole warp leaves together, with all words current. All
// blocks read the same few lines, and polling many costs the L2 more than the data does: of more than kPolledVectors,
// the first alone is polled until it is there, and then all.
constexpr int kPolledVectors = 2;

template <int N, typename Address>
__device__ __forceinline__ void await(uint4 (&v)[N], Address address, uint32_t use) {
    constexpr int kAlone = N > kPolledVectors ? 1 : 0;
    Watchdog watchdog;
    if constexpr (kAlone) {
        do {
            watchdog.check();
            v[0] = load_volatile(address(0));
        } while (!__all_sync(0xffffffffu, is_current(v[0], use)));
    }
    bool done;
    do {
        watchdog.check();
        done = true;
#pragma unroll
        for (int i = kAlone; i < N; ++i) v[i] = load_volatile(address(i));
#pragma unroll
        for (int i = kAlone; i < N; ++i) done &= is_current(v[i], use);
    } while (!__all_sync(0xffffffffu, done));
}

// Where element k of a projection's input lies: a lane needs the eight elements 8 lane .. 8 lane + 7 of a unit, and
// takes them with two loads of which each is contiguous over the warp.
__device__ __forceinline__ int packet_index(int k) {
    return (k & ~(kUnit - 1)) | ((k & 4) << 5) | ((k & 0xf8) >> 1) | (k & 3);
}

}  // namespace decode_step
