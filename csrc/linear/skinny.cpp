#include <cuda.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "common/cuda_check.h"
#include "linear/launch.h"

namespace linear {

template <int kTokens>
const void* kernel_for(bool norm, Epilogue epilogue);

namespace {

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

void require_aligned(const void* pointer, const char* name) {
    require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, std::string(name) + " must be 16-byte aligned");
}

const void* select_kernel(int tokens, bool norm, Epilogue epilogue) {
    switch (tokens) {
        case 8: return kernel_for<8>(norm, epilogue);
        case 16: return kernel_for<16>(norm, epilogue);
        case 32: return kernel_for<32>(norm, epilogue);
        case 64: return kernel_for<64>(norm, epilogue);
        default: return kernel_for<128>(norm, epilogue);
    }
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Asked of the runtime, not linked: the library must load where there is no driver.
EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<EncodeTiled>(entry);
    }();
    return function;
}

// A row-major bf16 matrix, read in boxes of 64 columns; rows and columns that do not exist read as zero.
CUtensorMap matrix_map(const void* matrix, int rows, int columns, int box_rows) {
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(columns) * 2};
    const cuuint32_t box[] = {kInner, cuuint32_t(box_rows)}, steps[] = {1, 1};
    CUtensorMap map;
    const CUresult status = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status));
    return map;
}

cudaLaunchConfig_t launch_config(int grid, int threads, int shared_bytes, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return config;
}

cudaLaunchAttribute cluster_attribute(int blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

int attribute_of(cudaDeviceAttr attribute, int device) {
    int value = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

}  // namespace

// Asked once a device: how many clusters of each size run at once depends on which SMs of the chip work.
const Machine& this_machine() {
    int device = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    static std::mutex mutex;
    static std::map<int, Machine> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    require(attribute_of(cudaDevAttrComputeCapabilityMajor, device) == 9, "the skinny product needs compute capability 9.0");
    Machine machine{};
    machine.shared_limit = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    machine.clusters[0] = attribute_of(cudaDevAttrMultiProcessorCount, device);
    const void* kernel = select_kernel(8, false, Epilogue::kAdd);
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, machine.shared_limit));
    for (int i = 1; i < 4; ++i) {
        // With all of an SM's shared memory, one block an SM.
        cudaLaunchConfig_t config = launch_config(1 << i, kThreads, machine.shared_limit, nullptr);
        cudaLaunchAttribute attribute = cluster_attribute(1 << i);
        config.attrs = &attribute, config.numAttrs = 1;
        CHECK_CUDA(cudaOccupancyMaxActiveClusters(&machine.clusters[i], kernel, &config));
    }
    return known.emplace(device, machine).first->second;
}

namespace {

// A block may use more than 48 KB only after this, once per kernel and device.
void allow_shared_memory(const void* kernel, int bytes) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> done;
    int device = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    if (!done.insert({kernel, device}).second) return;
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    // The same split of an SM's memory for every kernel: to change it, the SM has to run empty.
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

}  // namespace

static int env(const char* name, int otherwise) {  // EXPERIMENT ONLY: read at every launch
    const char* value = getenv(name);
    return value ? atoi(value) : otherwise;
}

void skinny(const Problem& q, const Wish& wish, bool overlap, cudaStream_t stream) {
    require_aligned(q.x, "x"), require_aligned(q.weight, "weight"), require_aligned(q.out, "out");
    require_aligned(q.norm_weight, "norm_weight"), require_aligned(q.residual, "residual");
    require((q.epilogue == Epilogue::kAdd) == (q.residual != nullptr), "a residual belongs to the add epilogue, and to no other");
    const bool norm = q.norm_weight != nullptr;
    const int tokens = padded_tokens(q.num_tokens);
    const void* kernel = select_kernel(tokens, norm, q.epilogue);
    require(kernel != nullptr, "there is no kernel for this epilogue with this norm");
    const Machine& machine = this_machine();
    const Tiling t = choose_tiling(q.num_tokens, q.num_rows, q.size, q.epilogue, machine, wish);
    allow_shared_memory(kernel, machine.shared_limit);

    CUtensorMap weight_map = matrix_map(q.weight, q.num_rows, q.size, t.tile_rows), x_map = matrix_map(q.x, q.num_tokens, q.size, tokens / t.sharers);
    Params p{q.norm_weight, q.residual, q.out, q.num_tokens, q.num_rows, q.size, t.tile_rows, t.tiles, t.splits, t.sharers, t.stages, t.one_tile,
             q.eps, env("LINEAR_EAGER", 0), env("LINEAR_TRIGGER", 1 << 20)};
    cudaLaunchConfig_t config = launch_config(t.grid, kThreads, t.shared_bytes, stream);
    const int cluster = t.splits * t.sharers;
    cudaLaunchAttribute attributes[2] = {cluster_attribute(cluster), {}};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = cluster > 1 ? attributes : attributes + 1;
    config.numAttrs = (cluster > 1) + overlap;
    void* arguments[] = {&weight_map, &x_map, &p};
    CHECK_CUDA(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace linear
