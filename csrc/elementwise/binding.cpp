// Python's door to the elementwise kernels: pointers and streams as integers (llama3/ops/elementwise.py takes them off
// the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "elementwise/launch.h"

namespace py = pybind11;
using namespace elementwise;

namespace {

using common::pointer, common::stream_at;

Launch how(int dtype, bool overlap, uintptr_t stream) {
    return {static_cast<common::Dtype>(dtype), overlap, stream_at(stream)};
}

}  // namespace

PYBIND11_MODULE(elementwise, module) {
    module.doc() = "Elementwise kernels; see llama3/ops/elementwise.py";
    using namespace py::literals;
    module.def(
        "embed",
        [](uintptr_t token_ids, uintptr_t table, uintptr_t out, uintptr_t squares, int num_tokens, int hidden_size,
           int dtype, bool overlap, uintptr_t stream) {
            embed({pointer<int64_t>(token_ids), pointer(table), pointer(out), pointer<float>(squares), num_tokens,
                   hidden_size},
                  how(dtype, overlap, stream));
        },
        "token_ids"_a, "table"_a, "out"_a, "squares"_a, "num_tokens"_a, "hidden_size"_a, "dtype"_a, "overlap"_a,
        "stream"_a);
    module.def(
        "rms_norm",
        [](uintptr_t x, uintptr_t weight, uintptr_t out, int num_rows, int hidden_size, float eps, int dtype,
           bool overlap, uintptr_t stream, uintptr_t squares) {
            rms_norm({pointer(x), pointer(weight), pointer(out), num_rows, hidden_size, eps, pointer<float>(squares)},
                     how(dtype, overlap, stream));
        },
        "x"_a, "weight"_a, "out"_a, "num_rows"_a, "hidden_size"_a, "eps"_a, "dtype"_a, "overlap"_a, "stream"_a,
        "squares"_a = 0);
    module.def(
        "silu_mul",
        [](uintptr_t gate_up, uintptr_t out, int64_t num_rows, int size, int dtype, bool overlap, uintptr_t stream) {
            silu_mul({pointer(gate_up), pointer(out), num_rows, size}, how(dtype, overlap, stream));
        },
        "gate_up"_a, "out"_a, "num_rows"_a, "size"_a, "dtype"_a, "overlap"_a, "stream"_a);
    module.def(
        "rope_append",
        [](uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t slots, uintptr_t positions, uintptr_t rotated,
           uintptr_t k_cache, uintptr_t v_cache, int num_tokens, int num_heads, int num_kv_heads, int head_dim,
           int blocks_per_slot, int dtype, bool overlap, uintptr_t stream) {
            rope_append({pointer(qkv), pointer<float>(cos), pointer<float>(sin), pointer<int64_t>(slots),
                         pointer<int64_t>(positions), pointer(rotated), pointer(k_cache), pointer(v_cache), num_tokens,
                         num_heads, num_kv_heads, head_dim, blocks_per_slot},
                        how(dtype, overlap, stream));
        },
        "qkv"_a, "cos"_a, "sin"_a, "slots"_a, "positions"_a, "rotated"_a, "k_cache"_a, "v_cache"_a, "num_tokens"_a,
        "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "blocks_per_slot"_a, "dtype"_a, "overlap"_a, "stream"_a);
    module.def(
        "gather_cache",
        [](uintptr_t k_cache, uintptr_t v_cache, uintptr_t slots, uintptr_t starts, uintptr_t k, uintptr_t v,
           int num_seqs, int num_tokens, int num_kv_heads, int head_dim, int blocks_per_slot, uintptr_t stream) {
            gather_cache({pointer(k_cache), pointer(v_cache), pointer<int>(slots), pointer<int>(starts), pointer(k),
                          pointer(v), num_seqs, num_tokens, num_kv_heads, head_dim, blocks_per_slot},
                         how(0, false, stream));
        },
        "k_cache"_a, "v_cache"_a, "slots"_a, "starts"_a, "k"_a, "v"_a, "num_seqs"_a, "num_tokens"_a, "num_kv_heads"_a,
        "head_dim"_a, "blocks_per_slot"_a, "stream"_a);
}
