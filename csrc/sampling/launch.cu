#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/require.h"
#include "sampling/instances.cuh"

namespace sampling {

namespace {

using common::require;

void check(const Params& p, const Launch& how) {
    require(p.batch >= 1 && p.batch <= 65535, "batch is " + std::to_string(p.batch) + "; supported: 1 to 65535");
    require(p.vocab_size >= 1 && p.vocab_size <= 1 << 28,
            "vocab_size is " + std::to_string(p.vocab_size) + "; supported: 1 to 2^28");
    const int blocks = how.blocks_per_row;
    require(blocks >= 1 && blocks <= kMaxBlocksPerRow && (blocks & (blocks - 1)) == 0,
            "blocks_per_row is " + std::to_string(blocks) + "; supported: 1, 2, 4, 8, 16");
    const bool state = p.token_ids && p.state_positions && p.last_positions && p.first_stop_positions;
    require(state || !(p.token_ids || p.state_positions || p.forbid_early_stops), "the decode state is incomplete");
}

using Kernel = void (*)(Params);

Kernel kernel_for(Dtype dtype, Mode mode) {
    switch (dtype) {
        case Dtype::kBFloat16:
            return kernel_of<__nv_bfloat16>(mode);
        case Dtype::kFloat16:
            return kernel_of<__half>(mode);
        case Dtype::kFloat32:
            return kernel_of<float>(mode);
    }
    throw std::invalid_argument("dtype must be bfloat16, float16 or float32");
}

}  // namespace

void launch(Params p, const Launch& how) {
    check(p, how);
    const int chunks = (p.vocab_size + kChunk - 1) / kChunk;
    p.chunks_per_block = (chunks + how.blocks_per_row - 1) / how.blocks_per_row;
    const int element = how.dtype == Dtype::kFloat32 ? 4 : 2;
    p.vector_loads = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.stride_logits_row * element % 16 == 0 &&
                     p.vocab_size % kChunk == 0;
    const Kernel kernel = kernel_for(how.dtype, how.mode);
    if (how.blocks_per_row > kPortableBlocksPerRow) {
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    common::LaunchConfig config(dim3(how.blocks_per_row, p.batch), kThreads, 0, how.stream);
    void* arguments[] = {&p};
    config.in_clusters(how.blocks_per_row, true)
        .overlapping(how.overlap)
        .launch(reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace sampling
