// 16 bytes in global memory that blocks pass to each other: a store becomes visible as a whole, so one word of it can
// say whether it has arrived, and neither a fence nor a flag is needed.
#pragma once
#include <cstdint>

namespace common {

__device__ __forceinline__ float4 load_relaxed(const float4* address) {
    uint64_t low, high;
    asm volatile("{.reg .b128 x; ld.relaxed.gpu.global.b128 x, [%2]; mov.b128 {%0, %1}, x;}"
                 : "=l"(low), "=l"(high)
                 : "l"(address)
                 : "memory");
    return {__uint_as_float(static_cast<uint32_t>(low)), __uint_as_float(static_cast<uint32_t>(low >> 32)),
            __uint_as_float(static_cast<uint32_t>(high)), __uint_as_float(static_cast<uint32_t>(high >> 32))};
}

__device__ __forceinline__ void store_relaxed(float4* address, float4 x) {
    const uint64_t low = __float_as_uint(x.x) | static_cast<uint64_t>(__float_as_uint(x.y)) << 32,
                   high = __float_as_uint(x.z) | static_cast<uint64_t>(__float_as_uint(x.w)) << 32;
    asm volatile("{.reg .b128 x; mov.b128 x, {%1, %2}; st.relaxed.gpu.global.b128 [%0], x;}" ::"l"(address), "l"(low),
                 "l"(high)
                 : "memory");
}

}  // namespace common
