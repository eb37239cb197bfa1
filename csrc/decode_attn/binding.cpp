// Python's door to the kernels: pointers and streams as integers, shapes and strides as numbers
// (llama3/ops/decode_attn.py takes them off the tensors). std::invalid_argument arrives as ValueError,
// std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/address.h"
#include "decode_attn/launch.h"
#include "decode_attn/split.h"

namespace py = pybind11;
using decode_attn::Launch;
using decode_attn::Params;

namespace {

using Strides3 = std::array<int64_t, 3>;
using Strides2 = std::array<int64_t, 2>;

using common::pointer, common::stream_at;

void decode(uintptr_t q, Strides2 q_strides, uintptr_t k_cache, Strides3 k_strides, uintptr_t v_cache,
            Strides3 v_strides, uintptr_t out, Strides2 out_strides, uintptr_t lse, uintptr_t lengths, uintptr_t slots,
            int blocks_per_slot, uintptr_t block_table, int64_t table_stride, uintptr_t cos, uintptr_t sin,
            uintptr_t partials, int64_t partials_size, int batch, int num_heads, int num_kv_heads, int head_dim,
            int num_blocks, float scale, int dtype, int grid, int min_tiles, int version, bool pdl, uintptr_t stream) {
    if (num_kv_heads < 1 || num_heads % num_kv_heads != 0)
        throw std::invalid_argument("num_heads must be a multiple of num_kv_heads");
    Params p{};
    p.q = pointer(q);
    p.k_cache = pointer(k_cache);
    p.v_cache = pointer(v_cache);
    p.out = pointer(out);
    p.lse = pointer<float>(lse);
    p.lengths = pointer<int>(lengths);
    p.slots = pointer<int>(slots);
    p.block_table = pointer<int>(block_table);
    p.partials = pointer<float>(partials);
    p.ranges = static_cast<int>(partials_size / decode_attn::kRangeFloats);
    p.cos = pointer<float>(cos);
    p.sin = pointer<float>(sin);
    p.stride_q_row = q_strides[0], p.stride_q_head = q_strides[1];
    p.stride_out_row = out_strides[0], p.stride_out_head = out_strides[1];
    p.stride_k_block = k_strides[0], p.stride_k_head = k_strides[1], p.stride_k_token = k_strides[2];
    p.stride_v_block = v_strides[0], p.stride_v_head = v_strides[1], p.stride_v_token = v_strides[2];
    p.stride_table_row = table_stride;
    p.batch = batch;
    p.num_kv_heads = num_kv_heads;
    p.group = num_heads / num_kv_heads;
    p.blocks_per_slot = blocks_per_slot;
    p.min_tiles = min_tiles;
    p.scale_log2 = scale * 1.4426950408889634f;
    Launch how{};
    how.dtype = static_cast<common::Dtype>(dtype);
    how.head_dim = head_dim;
    how.num_blocks = num_blocks;
    how.fused = cos != 0;
    how.pdl = pdl;
    how.grid = grid;
    how.version = static_cast<decode_attn::Version>(version);
    how.stream = stream_at(stream);
    decode_attn::launch(p, how);
}

}  // namespace

PYBIND11_MODULE(decode_attn, module) {
    module.doc() = "Split-KV flash-decode; see llama3/ops/decode_attn.py";
    module.attr("block_size") = decode_attn::kBlockSize;
    module.attr("max_group") = decode_attn::kMaxGroup;
    module.attr("empty_word") = decode_attn::kEmptyWord;
    module.attr("partial_floats") = decode_attn::kPartialFloats;
    module.attr("range_floats") = decode_attn::kRangeFloats;
    using namespace py::literals;
    module.def(
        "first_tiles",
        [](int tiles, int grid, int min_tiles) {
            const auto split =
                decode_attn::Split::of(tiles, grid, decode_attn::inverse(static_cast<float>(grid)), min_tiles);
            std::vector<int> first;
            for (int range = 0; range <= grid; ++range) first.push_back(split.begin(range));
            return first;
        },
        "tiles"_a, "grid"_a, "min_tiles"_a,
        "Where each block's range begins in the list of all tiles, and where the last one ends.");
    module.def(
        "range_of",
        [](int tile, int tiles, int grid, int min_tiles) {
            return decode_attn::Split::of(tiles, grid, decode_attn::inverse(static_cast<float>(grid)), min_tiles)
                .range_of(tile);
        },
        "tile"_a, "tiles"_a, "grid"_a, "min_tiles"_a);
    module.def(
        "workspace_floats",
        [](int version, int batch, int num_heads, int num_kv_heads, int head_dim, int grid) {
            return decode_attn::workspace_floats(static_cast<decode_attn::Version>(version), batch, num_heads,
                                                 num_kv_heads, head_dim, grid);
        },
        "version"_a, "batch"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "grid"_a);
    module.def("max_batch", &decode_attn::max_batch, "head_dim"_a, "shared_bytes"_a);
    module.def("decode", &decode, py::kw_only(), "q"_a, "q_strides"_a, "k_cache"_a, "k_strides"_a, "v_cache"_a,
               "v_strides"_a, "out"_a, "out_strides"_a, "lse"_a, "lengths"_a, "slots"_a, "blocks_per_slot"_a,
               "block_table"_a, "table_stride"_a, "cos"_a, "sin"_a, "partials"_a, "partials_size"_a, "batch"_a,
               "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "num_blocks"_a, "scale"_a, "dtype"_a, "grid"_a,
               "min_tiles"_a, "version"_a, "pdl"_a, "stream"_a);
}
