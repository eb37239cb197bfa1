// CUDA errors as exceptions that say which call failed.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace common {

inline void check_cuda(cudaError_t status, const char* call) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // clear it: the next call must not be blamed
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
    }
}

}  // namespace common

#define CHECK_CUDA(call) ::common::check_cuda((call), #call)
