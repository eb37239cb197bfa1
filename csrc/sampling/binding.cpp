// Python's door to the kernels: pointers and streams as integers (llama3/ops/sampling.py takes them off the tensors).
// std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "sampling/params.h"

namespace py = pybind11;
using namespace sampling;

namespace {

using common::pointer, common::stream_at;

// The rules of all rows, by the names of SamplingTensors.
struct Rules {
    uintptr_t temperature, top_k, top_p, min_p, seed, request, sample;
};

// The rows of a DecodeState, by its names; null where the tokens are only returned.
struct State {
    uintptr_t token_ids, positions, last_positions, first_stop_positions, stop_ids;
    int num_stop_ids;
    bool forbid_early_stops;
};

void sample(uintptr_t logits, int64_t stride_logits_row, int batch, int vocab_size, int dtype, const Rules& rules,
            uintptr_t positions, uintptr_t out, const State& state, int mode, int blocks_per_row, bool overlap,
            uintptr_t stream) {
    Params p{};
    p.logits = pointer(logits);
    p.stride_logits_row = stride_logits_row;
    p.batch = batch, p.vocab_size = vocab_size;
    p.temperature = pointer<float>(rules.temperature);
    p.top_p = pointer<float>(rules.top_p);
    p.min_p = pointer<float>(rules.min_p);
    p.top_k = pointer<int64_t>(rules.top_k);
    p.seed = pointer<int64_t>(rules.seed);
    p.request = pointer<int64_t>(rules.request);
    p.sample = pointer<int64_t>(rules.sample);
    p.positions = pointer<int>(positions);
    p.out = pointer<int64_t>(out);
    p.token_ids = pointer<int64_t>(state.token_ids);
    p.state_positions = pointer<int>(state.positions);
    p.last_positions = pointer<int>(state.last_positions);
    p.first_stop_positions = pointer<int>(state.first_stop_positions);
    p.stop_ids = pointer<int64_t>(state.stop_ids);
    p.num_stop_ids = state.num_stop_ids;
    p.forbid_early_stops = state.forbid_early_stops;
    launch(p, {static_cast<Dtype>(dtype), static_cast<Mode>(mode), blocks_per_row, overlap, stream_at(stream)});
}

}  // namespace

PYBIND11_MODULE(sampling, module) {
    module.doc() = "Drawing tokens from logits; see llama3/ops/sampling.py";
    module.attr("max_blocks_per_row") = kMaxBlocksPerRow;
    module.attr("portable_blocks_per_row") = kPortableBlocksPerRow;
    using namespace py::literals;
    py::class_<Rules>(module, "Rules")
        .def(py::init([](uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t seed,
                         uintptr_t request,
                         uintptr_t sample) { return Rules{temperature, top_k, top_p, min_p, seed, request, sample}; }),
             py::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a, "request"_a, "sample"_a);
    py::class_<State>(module, "State")
        .def(
            py::init([](uintptr_t token_ids, uintptr_t positions, uintptr_t last_positions,
                        uintptr_t first_stop_positions, uintptr_t stop_ids, int num_stop_ids, bool forbid_early_stops) {
                return State{token_ids, positions,    last_positions,    first_stop_positions,
                             stop_ids,  num_stop_ids, forbid_early_stops};
            }),
            py::kw_only(), "token_ids"_a = 0, "positions"_a = 0, "last_positions"_a = 0, "first_stop_positions"_a = 0,
            "stop_ids"_a = 0, "num_stop_ids"_a = 0, "forbid_early_stops"_a = false);
    module.def("sample", &sample, py::kw_only(), "logits"_a, "stride_logits_row"_a, "batch"_a, "vocab_size"_a,
               "dtype"_a, "rules"_a, "positions"_a, "out"_a, "state"_a, "mode"_a, "blocks_per_row"_a, "overlap"_a,
               "stream"_a);
}
