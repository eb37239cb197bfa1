#include <string>

#include "common/launch.h"
#include "common/require.h"
#include "common/tensor_map.h"
#include "short_prefill/kernel.cuh"
#include "short_prefill/launch.h"

namespace short_prefill {
namespace {

using common::require, common::require_aligned;

void check(const Params& p, const Launch& how) {
    require(how.head_dim == 64 || how.head_dim == 128,
            "head_dim is " + std::to_string(how.head_dim) + "; supported: 64, 128");
    require(p.num_seqs >= 1, "there are no prompts");
    require(p.max_tokens >= 1 && p.max_tokens <= kMaxTokens,
            "max_tokens is " + std::to_string(p.max_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    require(p.num_positions >= 1, "the tables have no positions");
    require(p.num_kv_heads >= 1 && p.num_heads >= 1 && p.num_heads % p.num_kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads");
    require(p.block_heads >= 1 && p.blocks_per_slot >= 1, "block_heads and blocks_per_slot must be at least 1");
    const struct {
        const char* name;
        const void* pointer;
    } operands[] = {{"qkv", p.qkv}, {"cos", p.cos},         {"sin", p.sin},
                    {"out", p.out}, {"k_cache", p.k_cache}, {"v_cache", p.v_cache}};
    for (const auto& operand : operands) require_aligned(operand.pointer, operand.name);
}

template <typename T>
auto kernel_of(int head_dim) {
    return head_dim == 64 ? short_prefill_kernel<T, 64> : short_prefill_kernel<T, 128>;
}

}  // namespace

void launch(const Params& p, const Launch& how) {
    check(p, how);
    auto* kernel = how.dtype == common::Dtype::kBFloat16 ? kernel_of<__nv_bfloat16>(how.head_dim)
                                                         : kernel_of<__half>(how.head_dim);
    common::allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes(kMaxTokens, how.head_dim));
    common::launch(kernel, p.num_seqs * p.num_kv_heads * p.shares(), kThreads, shared_bytes(p.max_tokens, how.head_dim),
                   how.stream, how.overlap, p);
}

}  // namespace short_prefill
