// 16 bytes of 16-bit elements as eight floats, and the checks that such accesses need.
#pragma once
#include <stdexcept>
#include <string>

#include "common/types.cuh"

namespace elementwise {

template <typename T>
__device__ __forceinline__ void to_floats(const uint4& chunk, float (&x)[8]) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = common::Pack<T>::to_floats(words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[8]) {
    return {common::Pack<T>::from_floats(x[0], x[1]), common::Pack<T>::from_floats(x[2], x[3]),
            common::Pack<T>::from_floats(x[4], x[5]), common::Pack<T>::from_floats(x[6], x[7])};
}

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

inline void require_aligned(const void* pointer, const char* name) {
    require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, std::string(name) + " must be 16-byte aligned");
}

}  // namespace elementwise
