// Python's door to the persistent decode step: a Params whose fields are set by name, pointers as integers.
#include <pybind11/pybind11.h>

#include "decode_step/params.h"

namespace py = pybind11;
using decode_step::Params;

PYBIND11_MODULE(decode_step, module) {
    using namespace py::literals;
    module.doc() = "A whole batch-1 decode step in one kernel; see llama3/ops/decode_step.py";
    py::class_<Params> params(module, "Params", py::module_local());
    params.def(py::init([] { return Params{}; }));
#define NUMBER(name) params.def_readwrite(#name, &Params::name)
#define POINTER(name)                                                               \
    params.def_property(                                                            \
        #name, [](const Params& p) { return reinterpret_cast<uintptr_t>(p.name); }, \
        [](Params& p, uintptr_t address) { p.name = reinterpret_cast<decltype(p.name)>(address); })
    // clang-format off
    POINTER(layers); POINTER(embed); POINTER(final_norm); POINTER(lm_head); POINTER(cos); POINTER(sin);
    POINTER(k_cache); POINTER(v_cache); POINTER(token_id); POINTER(position); POINTER(slot); POINTER(stop_ids);
    POINTER(first_stop_position); POINTER(last_position); POINTER(temperature); POINTER(top_p); POINTER(min_p);
    POINTER(top_k); POINTER(seed); POINTER(request);
    POINTER(sample); POINTER(logits); POINTER(drawn); POINTER(x_attn); POINTER(x_mlp); POINTER(qkv); POINTER(attn);
    POINTER(act); POINTER(split_out); POINTER(split_state); POINTER(ballots); POINTER(steps_done);
    POINTER(profile);
    NUMBER(stride_cache_layer); NUMBER(blocks_per_slot); NUMBER(max_positions); NUMBER(num_layers);
    NUMBER(hidden_size); NUMBER(num_heads); NUMBER(num_kv_heads); NUMBER(vocab_size); NUMBER(rms_norm_eps);
    NUMBER(softmax_scale_log2); NUMBER(max_streaming); NUMBER(max_exchanging); NUMBER(exchange_chunks);
    NUMBER(max_splits); NUMBER(single_split_tiles); NUMBER(num_stop_ids); NUMBER(num_steps); NUMBER(draws);
    // clang-format on
#undef NUMBER
#undef POINTER
    params.def("set_linear", [](Params& p, int op, int rows, int k, int row_unit) {
        p.linear[op] = decode_step::make_linear(rows, k, row_unit);
    });

    module.attr("max_group") = decode_step::kMaxGroup;
    module.attr("slot_bytes") = decode_step::kSlotBytes;
    module.attr("max_head_rows") = decode_step::kMaxHeadRows;
    module.attr("ballot_stride") = decode_step::kBallotStride;
    module.attr("max_splits") = decode_step::kMaxSplits;
    module.attr("profile_slots") = 32;
    module.def(
        "fits_columns", [](int k) { return decode_step::make_linear(1, k, 1).units > 0; }, "k"_a,
        "Whether rows of k columns can be dealt to the warps.");
    module.def("fixed_smem_bytes", &decode_step::fixed_smem_bytes, "num_layers"_a, "head_dim"_a, "group"_a);
    module.def(
        "launch",
        [](const Params& p, int head_dim, int grid, int max_smem_bytes, uintptr_t stream) {
            decode_step::launch(p, head_dim, grid, max_smem_bytes, reinterpret_cast<void*>(stream));
        },
        "params"_a, "head_dim"_a, "grid"_a, "max_smem_bytes"_a, "stream"_a);
}
