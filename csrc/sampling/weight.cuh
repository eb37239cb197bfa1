// What a logit weighs where top-p counts: its probability over the greatest one, in units of 2^-31. Integers, so that a
// sum depends neither on the order of the additions nor on how a row is cut.
//
// Logits stand for scores (logit / temperature): division by a positive number keeps the order.
#pragma once
#include <cstdint>

namespace sampling {

__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

struct Weight {
    float top, scale;  // the row's greatest logit; log2(e) / temperature

    __device__ __forceinline__ uint32_t of(float x) const {
        return __float2uint_rn(fast_exp2((x - top) * scale) * 0x1p31f);
    }
    // The same over 2^31 in fewer operations. It differs by less than error() of its value and half a unit: exponents
    // of -32 and above round at 2^-19 and better, and one that is the difference of two large numbers as they do.
    __device__ __forceinline__ float about(float x) const { return fast_exp2(fmaf(x, scale, -top * scale)); }
    __device__ __forceinline__ float error() const { return 0x1p-17f + 0x1p-24f * fabsf(top * scale); }
};

}  // namespace sampling
