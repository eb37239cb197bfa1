// Gumbel noise from a counter-based generator, exactly as llama3/sampling.py defines it.
#pragma once
#include <cstdint>

#include "common/async.cuh"

namespace sampling {

// Philox4x32-10 (Salmon et al., SC 2011) for one row, in shared memory: what does not depend on the token of the first
// two rounds, whose counter is (token / 4, position, request, sample), and the keys of the other eight.
struct Noise {
    uint4 start, keys[4];  // keys: (low, high) of two rounds

    // By one thread.
    __device__ __forceinline__ void fill(int64_t seed, uint32_t position, uint32_t request, uint32_t sample) {
        uint2 key = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        const uint64_t first = uint64_t{request} * kMultiplier1;
        const uint64_t second = uint64_t{static_cast<uint32_t>(first >> 32) ^ position ^ key.x} * kMultiplier0;
        start.x = sample ^ key.y;
        key = next(key);
        start.y = static_cast<uint32_t>(first) ^ key.x;
        start.z = static_cast<uint32_t>(second >> 32) ^ key.y;
        start.w = static_cast<uint32_t>(second);
#pragma unroll
        for (uint4& pair : keys) {
            const uint2 even = next(key);
            key = next(even);
            pair = make_uint4(even.x, even.y, key.x, key.y);
        }
    }

    // The words of the 4 * kBlocks tokens from 4 * block on.
    template <int kBlocks>
    __device__ __forceinline__ void words(uint32_t block, uint32_t (&out)[4 * kBlocks]) const {
        const uint4 from = load(start);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            uint32_t* c = out + 4 * i;
            uint32_t high;
            multiply<kMultiplier0>(block + i, high, c[2]);
            multiply<kMultiplier1>(high ^ from.x, high, c[1]);
            c[0] = high ^ from.y, c[2] ^= from.z, c[3] = from.w;
        }
#pragma unroll
        for (int round = 0; round < 8; round += 2) {
            const uint4 pair = load(keys[round / 2]);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) mix(out + 4 * i, pair.x, pair.y);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) mix(out + 4 * i, pair.z, pair.w);
        }
    }

  private:
    static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

    __device__ __forceinline__ static uint2 next(uint2 key) {
        return make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    // Volatile: or twenty words would be hoisted into registers that are needed elsewhere.
    __device__ __forceinline__ static uint4 load(const uint4& words) {
        uint4 result;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
                     : "r"(common::shared_address(&words)));
        return result;
    }
    template <uint32_t kFactor>
    __device__ __forceinline__ static void multiply(uint32_t x, uint32_t& high, uint32_t& low) {
        const uint64_t product = uint64_t{x} * kFactor;
        high = static_cast<uint32_t>(product >> 32), low = static_cast<uint32_t>(product);
    }
    __device__ __forceinline__ static void mix(uint32_t* c, uint32_t key_low, uint32_t key_high) {
        uint32_t high_0, high_1, low_0, low_1;
        multiply<kMultiplier0>(c[0], high_0, low_0);
        multiply<kMultiplier1>(c[2], high_1, low_1);
        c[0] = high_1 ^ c[1] ^ key_low;
        c[1] = low_1;
        c[2] = high_0 ^ c[3] ^ key_high;
        c[3] = low_0;
    }
};

// The noise of one word: -log(e) with the exponential e = -log(1 - u), u = (word + 1/2) / 2^32 in fp32.
__device__ __forceinline__ float gumbel(uint32_t word) {
    const float uniform = (__uint2float_rn(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    return -logf(-log1pf(-uniform));
}

constexpr float kMostNoise = 23.f;  // that of word 0 is 22.87

__device__ __forceinline__ float fast_log(float x) {
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(x));
    return log2 * 0.69314718f;
}

// Bounds of that noise at a fraction of its cost, from the 23 upper bits of the word: u <= e <= u / (1 - u). Each is
// good to 1e-6; the upper one is +inf for the lowest words, the lower one NaN for the highest.
__device__ __forceinline__ float gumbel_at_most(uint32_t word) {
    return -fast_log(__uint_as_float(0x3F800000u | word >> 9) - 1.f);
}

__device__ __forceinline__ float gumbel_at_least(uint32_t word) {
    const float uniform = __uint_as_float(0x3F800000u | word >> 9) - 1.f + 2.3841858e-7f;  // 2^-22
    return fast_log(1.f - uniform) - fast_log(uniform);
}

}  // namespace sampling
