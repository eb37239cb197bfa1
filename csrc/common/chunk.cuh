// 16 bytes of 16-bit elements as eight floats, and their rotation.
#pragma once
#include "common/types.cuh"

namespace common {

template <typename T>
__device__ __forceinline__ void to_floats(const uint4& chunk, float (&x)[8]) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = Pack<T>::to_floats(words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[8]) {
    return {Pack<T>::from_floats(x[0], x[1]), Pack<T>::from_floats(x[2], x[3]), Pack<T>::from_floats(x[4], x[5]),
            Pack<T>::from_floats(x[6], x[7])};
}

// The cosines and sines of eight columns at one position.
struct Angles {
    float cosine[8], sine[8];
    // `offset` floats into the tables.
    __device__ __forceinline__ Angles(const float* cos, const float* sin, int64_t offset) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            *reinterpret_cast<float4*>(cosine + i) = __ldg(reinterpret_cast<const float4*>(cos + offset + i));
            *reinterpret_cast<float4*>(sine + i) = __ldg(reinterpret_cast<const float4*>(sin + offset + i));
        }
    }
};

// RoPE, half-split layout: `high` lies half a head behind `low`. fp32, then rounded once.
template <typename T>
__device__ __forceinline__ void rotate(uint4& low, uint4& high, const Angles& by) {
    float a[8], b[8], turned_a[8], turned_b[8];
    to_floats<T>(low, a);
    to_floats<T>(high, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        turned_a[i] = a[i] * by.cosine[i] - b[i] * by.sine[i];
        turned_b[i] = b[i] * by.cosine[i] + a[i] * by.sine[i];
    }
    low = from_floats<T>(turned_a), high = from_floats<T>(turned_b);
}

}  // namespace common
