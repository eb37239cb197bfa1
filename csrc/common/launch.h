// Launching a kernel, optionally in clusters and with programmatic dependent launch (PDL).
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

// Grid, block and attributes of a launch. It points into itself.
class LaunchConfig {
  public:
    LaunchConfig(dim3 grid, int threads, int shared_bytes, cudaStream_t stream) {
        config_.gridDim = grid;
        config_.blockDim = dim3(threads);
        config_.dynamicSmemBytes = shared_bytes;
        config_.stream = stream;
        config_.attrs = attributes_;
    }
    LaunchConfig(const LaunchConfig&) = delete;

    // Clusters of so many blocks, neighbours in x. `spread`: otherwise they are packed onto few multiprocessors
    // while others idle.
    LaunchConfig& in_clusters(int blocks, bool spread = false) {
        if (blocks == 1) return *this;
        add(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(blocks), 1, 1};
        if (spread)
            add(cudaLaunchAttributeClusterSchedulingPolicyPreference).clusterSchedulingPolicyPreference =
                cudaClusterSchedulingPolicyLoadBalancing;
        return *this;
    }
    // The kernel may start while the previous one on the stream still runs. It then must call
    // wait_for_previous_kernel() in every thread before it touches anything but constants, and allow_next_kernel() only
    // after that, so that a kernel's start implies that everything before its predecessor is complete. (Decode
    // attention does so at once: its successor may read nothing but constants before its own wait.)
    LaunchConfig& overlapping(bool overlap = true) {
        if (overlap) add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
        return *this;
    }

    const cudaLaunchConfig_t& get() const { return config_; }
    // `arguments`: a pointer to each.
    void launch(const void* kernel, void** arguments) const {
        CHECK_CUDA(cudaLaunchKernelExC(&config_, kernel, arguments));
    }

  private:
    cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
        cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
        attribute.id = id;
        return attribute.val;
    }

    cudaLaunchAttribute attributes_[3]{};
    cudaLaunchConfig_t config_{};
};

// A launch of a kernel whose parameters the compiler knows, without clusters.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, bool overlap,
            const Arguments&... arguments) {
    LaunchConfig config(grid, threads, shared_bytes, stream);
    CHECK_CUDA(cudaLaunchKernelEx(&config.overlapping(overlap).get(), kernel, Parameters(arguments)...));
}

}  // namespace common
