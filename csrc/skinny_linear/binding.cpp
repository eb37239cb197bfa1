// Python's door to the skinny products: pointers and streams as integers (llama3/ops/skinny_linear.py takes them off
// the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "skinny_linear/launch.h"

namespace py = pybind11;
using namespace skinny_linear;

using common::pointer, common::stream_at;

PYBIND11_MODULE(skinny_linear, module) {
    module.doc() = "Matrix products for few tokens; see llama3/ops/skinny_linear.py";
    module.attr("max_tokens") = kMaxTokens;
    using namespace py::literals;
    module.def(
        "product",
        [](uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int num_tokens, int num_rows, int size,
           float eps, int form, int tile_rows, int splits, int shared_bytes, int trigger, int ahead, bool overlap,
           uintptr_t stream) {
            launch({pointer(x), pointer(weight), pointer(residual), pointer(out), num_tokens, num_rows, size, eps,
                    static_cast<Form>(form)},
                   {tile_rows, splits, shared_bytes, trigger, ahead}, overlap, stream_at(stream));
        },
        "x"_a, "weight"_a, "residual"_a, "out"_a, "num_tokens"_a, "num_rows"_a, "size"_a, "eps"_a, "form"_a,
        "tile_rows"_a, "splits"_a, "shared_bytes"_a, "trigger"_a, "ahead"_a, "overlap"_a, "stream"_a);
}
