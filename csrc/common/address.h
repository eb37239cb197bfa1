// What Python hands over as integers: addresses, and the stream.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace common {

template <typename T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline cudaStream_t stream_at(uintptr_t address) {
    return reinterpret_cast<cudaStream_t>(address);
}

}  // namespace common
