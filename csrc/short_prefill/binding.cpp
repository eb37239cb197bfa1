// Python's door to attention for short prompts: pointers and streams as integers (llama3/ops/short_prefill.py takes
// them off the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "short_prefill/launch.h"

namespace py = pybind11;
using namespace short_prefill;

using common::pointer, common::stream_at;

PYBIND11_MODULE(short_prefill, module) {
    module.doc() = "Attention of short prompts; see llama3/ops/short_prefill.py";
    module.attr("MAX_TOKENS") = kMaxTokens;
    module.attr("BLOCKS_PER_SM") = kBlocksPerSM;
    using namespace py::literals;
    module.def(
        "rope_append_attend",
        [](uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t slots, uintptr_t positions, uintptr_t starts,
           uintptr_t out, uintptr_t k_cache, uintptr_t v_cache, int num_seqs, int max_tokens, int num_positions,
           int num_heads, int num_kv_heads, int head_dim, int blocks_per_slot, int block_heads, int dtype, bool overlap,
           uintptr_t stream) {
            launch({pointer(qkv), pointer<float>(cos), pointer<float>(sin), pointer<int64_t>(slots),
                    pointer<int64_t>(positions), pointer<int>(starts), pointer(out), pointer(k_cache), pointer(v_cache),
                    num_seqs, max_tokens, num_positions, num_heads, num_kv_heads, blocks_per_slot, block_heads},
                   {static_cast<common::Dtype>(dtype), head_dim, overlap, stream_at(stream)});
        },
        "qkv"_a, "cos"_a, "sin"_a, "slots"_a, "positions"_a, "starts"_a, "out"_a, "k_cache"_a, "v_cache"_a,
        "num_seqs"_a, "max_tokens"_a, "num_positions"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
        "blocks_per_slot"_a, "block_heads"_a, "dtype"_a, "overlap"_a, "stream"_a);
}
