#include <string>

#include "common/launch.h"
#include "common/require.h"
#include "common/tensor_map.h"
#include "decode_attn/ladder.h"
#include "decode_attn/launch.h"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

template <typename T, int kHeadDim>
const void* kernel_for(Loader loader, bool fused);

namespace {

using common::require;

void check(const Params& p, const Launch& how) {
    require(how.head_dim == 64 || how.head_dim == 128,
            "head_dim is " + std::to_string(how.head_dim) + "; supported: 64, 128");
    require(p.batch >= 1 && p.num_kv_heads >= 1, "batch and num_kv_heads must be at least 1");
    require(p.group >= 1 && p.group <= kMaxGroup, "num_heads / num_kv_heads is " + std::to_string(p.group) +
                                                      "; supported: 1 to " + std::to_string(kMaxGroup));
    require(how.grid >= 1, "grid must be at least 1");
    const int64_t strides[] = {p.stride_k_block, p.stride_k_head, p.stride_k_token,
                               p.stride_v_block, p.stride_v_head, p.stride_v_token};
    for (const int64_t stride : strides)
        require(stride > 0 && stride % 8 == 0, "cache strides must be positive multiples of 8 elements");
    const void* aligned[] = {p.k_cache, p.v_cache};
    for (const void* x : aligned)
        require(reinterpret_cast<uintptr_t>(x) % 16 == 0, "k_cache and v_cache must be 16-byte aligned");
    require(p.stride_q_row % 2 == 0 && p.stride_q_head % 2 == 0, "q strides must be even");
    require(!how.fused || (p.cos && p.sin), "the fused kernel needs cos and sin");
    require(!how.fused || how.version >= Version::kRing, "this version has no fused form; choose ring or tma");
}

// The cache as (column in a panel of 64, token, panel, kv head, block), in boxes of so many tokens and panels.
CUtensorMap cache_map(const void* cache, const Launch& how, int num_kv_heads, int64_t stride_block, int64_t stride_head,
                      int64_t stride_token, int box_tokens, int box_panels) {
    const cuuint64_t sizes[] = {64, kBlockSize, cuuint64_t(how.head_dim / 64), cuuint64_t(num_kv_heads),
                                cuuint64_t(how.num_blocks)};
    const cuuint64_t strides[] = {cuuint64_t(stride_token) * 2, 128, cuuint64_t(stride_head) * 2,
                                  cuuint64_t(stride_block) * 2};
    const cuuint32_t box[] = {64, cuuint32_t(box_tokens), cuuint32_t(box_panels), 1, 1};
    const cuuint32_t steps[] = {1, 1, 1, 1, 1};
    const auto type =
        how.dtype == common::Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUtensorMap map;
    common::check_map(common::encode_tiled()(&map, type, 5, const_cast<void*>(cache), sizes, strides, box, steps,
                                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

CacheMaps cache_maps(const void* cache, const Launch& how, int num_kv_heads, int64_t stride_block, int64_t stride_head,
                     int64_t stride_token) {
    const auto map = [&](int tokens, int panels) {
        return cache_map(cache, how, num_kv_heads, stride_block, stride_head, stride_token, tokens, panels);
    };
    return {map(kBlockSize, how.head_dim / 64), map(kBoxTokens, 1)};
}

const void* select_kernel(const Launch& how, Loader loader) {
    if (how.dtype == common::Dtype::kBFloat16) {
        return how.head_dim == 64 ? kernel_for<__nv_bfloat16, 64>(loader, how.fused)
                                  : kernel_for<__nv_bfloat16, 128>(loader, how.fused);
    }
    return how.head_dim == 64 ? kernel_for<__half, 64>(loader, how.fused) : kernel_for<__half, 128>(loader, how.fused);
}

}  // namespace

int64_t workspace_floats(Version version, int batch, int num_heads, int num_kv_heads, int head_dim, int grid) {
    if (version >= Version::kRing) return int64_t(grid) * kRangeFloats;
    const int64_t parts = ladder_parts(version, batch, num_heads, num_kv_heads, grid);
    return parts == 1 ? 0 : parts * batch * num_heads * (head_dim + 2);
}

int max_batch(int head_dim, int shared_bytes) {
    const int empty = SharedLayout::of(head_dim, 0, kTileGroups).bytes;
    return (shared_bytes - empty) / (SharedLayout::of(head_dim, 1, kTileGroups).bytes - empty);
}

void launch(Params p, const Launch& how) {
    check(p, how);
    if (how.version < Version::kRing) return launch_ladder(p, how);
    const Loader loader = how.version == Version::kTma ? Loader::kTma : Loader::kCpAsync;
    const void* kernel = select_kernel(how, loader);

    const int limit = common::shared_memory_limit();
    p.stages = max_stages(how.head_dim);
    while (p.stages > kTileGroups && SharedLayout::of(how.head_dim, p.batch, p.stages).bytes > limit)
        p.stages -= kTileGroups;
    const int bytes = SharedLayout::of(how.head_dim, p.batch, p.stages).bytes;
    require(bytes <= limit, "batch " + std::to_string(p.batch) + " needs " + std::to_string(bytes) +
                                " bytes of shared memory, this GPU has " + std::to_string(limit));
    common::allow_shared_memory(kernel, limit, true);

    TensorMaps maps{};
    if (loader == Loader::kTma) {
        maps.k = cache_maps(p.k_cache, how, p.num_kv_heads, p.stride_k_block, p.stride_k_head, p.stride_k_token);
        maps.v = cache_maps(p.v_cache, how, p.num_kv_heads, p.stride_v_block, p.stride_v_head, p.stride_v_token);
    }

    common::LaunchConfig config(dim3(how.grid), kThreads, bytes, how.stream);
    void* arguments[] = {&p, &maps};
    config.overlapping(how.pdl).launch(kernel, arguments);
}

}  // namespace decode_attn
