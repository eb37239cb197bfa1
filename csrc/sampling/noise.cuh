// Gumbel noise from a counter-based generator, exactly as llama3/sampling.py defines it.
#pragma once
#include <cstdint>

namespace sampling {

struct Noise {
    uint32_t key_low, key_high, position, request, sample;

    // Philox4x32-10 (Salmon et al., SC 2011): the four words of tokens 4 * block .. 4 * block + 3.
    __device__ __forceinline__ void words(uint32_t block, uint32_t (&out)[4]) const {
        uint32_t c0 = block, c1 = position, c2 = request, c3 = sample, k0 = key_low, k1 = key_high;
        asm volatile("" : "+r"(k0), "+r"(k1));  // keep the ten keys from being hoisted: registers are dearer than sums
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
            const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(product_1);
            c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(product_0);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
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
