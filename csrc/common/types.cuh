// Element types of tensors: what the 16-bit types have in common, so that a kernel is written once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace common {

constexpr int kChunk = 8;  // elements in 16 bytes

enum class Dtype : int { kBFloat16 = 0, kFloat16 = 1 };

template <typename T>
struct Pack;  // two neighbours in one 32-bit register, the lower address in the lower half

template <>
struct Pack<__nv_bfloat16> {
    static __device__ __forceinline__ uint32_t from_floats(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    static __device__ __forceinline__ float2 to_floats(uint32_t bits) {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
    }
    static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
};

template <>
struct Pack<__half> {
    static __device__ __forceinline__ uint32_t from_floats(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    static __device__ __forceinline__ float2 to_floats(uint32_t bits) {
        return __half22float2(*reinterpret_cast<const __half2*>(&bits));
    }
    static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
};

}  // namespace common
