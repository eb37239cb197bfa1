// Gumbel noise from a counter-based generator, exactly as llama3/sampling.py defines it.
#pragma once
#include <cstdint>

#include "common/async.cuh"

namespace sampling {

// Philox4x32-10 (Salmon et al., SC 2011) for one row. The keys of its ten rounds lie in shared memory.
struct Noise {
    static constexpr int kRounds = 10;
    using Keys = uint4[kRounds / 2];  // (low, high) of two rounds

    const Keys& keys;
    uint32_t position, request, sample;

    // By kRounds threads, numbered by `round`.
    __device__ __forceinline__ static void fill(Keys& keys, int64_t seed, uint32_t round) {
        uint32_t* words = &keys[0].x + 2 * round;
        words[0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
        words[1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }

    // The words of the 4 * kBlocks tokens from 4 * block on.
    template <int kBlocks>
    __device__ __forceinline__ void words(uint32_t block, uint32_t (&out)[4 * kBlocks]) const {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            out[4 * i] = block + i, out[4 * i + 1] = position, out[4 * i + 2] = request, out[4 * i + 3] = sample;
        }
#pragma unroll
        for (int round = 0; round < kRounds; round += 2) {
            uint4 pair;  // volatile: or twenty keys would be hoisted into registers that are needed elsewhere
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(pair.x), "=r"(pair.y), "=r"(pair.z), "=r"(pair.w)
                         : "r"(common::shared_address(&keys[round / 2])));
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) mix(out + 4 * i, pair.x, pair.y);
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) mix(out + 4 * i, pair.z, pair.w);
        }
    }

  private:
    __device__ __forceinline__ static void mix(uint32_t* c, uint32_t key_low, uint32_t key_high) {
        const uint64_t product_0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
        const uint64_t product_1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
        c[0] = static_cast<uint32_t>(product_1 >> 32) ^ c[1] ^ key_low;
        c[1] = static_cast<uint32_t>(product_1);
        c[2] = static_cast<uint32_t>(product_0 >> 32) ^ c[3] ^ key_high;
        c[3] = static_cast<uint32_t>(product_0);
    }
};

// The noise of one word: -log(e) with the exponential e = -log(1 - u), u = (word + 1/2) / 2^32 in fp32.
__device__ __forceinline__ float gumbel(uint32_t word) {
    const float uniform = (__uint2float_rn(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    return -logf(-log1pf(-uniform));
}

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
