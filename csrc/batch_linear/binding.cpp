// Python's door to the products of a decode step: pointers and streams as integers (llama3/ops/batch_linear.py takes
// them off the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "batch_linear/launch.h"
#include "common/address.h"

namespace py = pybind11;
using namespace batch_linear;

using common::pointer, common::stream_at;

PYBIND11_MODULE(batch_linear, module) {
    module.doc() = "Matrix products for the tokens of a decode step; see llama3/ops/batch_linear.py";
    module.attr("max_tokens") = kMaxTokens;
    using namespace py::literals;
    module.def(
        "product",
        [](uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int num_tokens, int num_rows, int size,
           float eps, int form, int splits, int trigger, int shared_bytes, int tile_rows, int ahead, int x_stages,
           uintptr_t squares, int count, bool overlap, uintptr_t stream) {
            launch({pointer(x), pointer(weight), pointer(residual), pointer(out), num_tokens, num_rows, size, eps,
                    static_cast<Form>(form)},
                   {pointer<float>(squares), count}, {splits, trigger, shared_bytes, tile_rows, ahead, x_stages},
                   overlap, stream_at(stream));
        },
        "x"_a, "weight"_a, "residual"_a, "out"_a, "num_tokens"_a, "num_rows"_a, "size"_a, "eps"_a, "form"_a, "splits"_a,
        "trigger"_a, "shared_bytes"_a, "tile_rows"_a, "ahead"_a, "x_stages"_a, "squares"_a, "count"_a, "overlap"_a,
        "stream"_a);
}
