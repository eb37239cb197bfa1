// Launching a kernel, optionally with programmatic dependent launch (PDL).
#pragma once
#include <cuda_runtime.h>

#include "common/cuda_check.h"

namespace common {

// Of the current device.
inline int multiprocessors() {
    int device = 0, count = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// `overlap`: the kernel may start while the previous one on the stream still runs. It then must call
// wait_for_previous_kernel() in every thread before it touches anything but constants, and allow_next_kernel() only
// after that, so that a kernel's start implies that everything before its predecessor is complete. (Decode attention
// does so at once: its successor may read nothing but constants before its own wait.)
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, bool overlap,
            const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace common
