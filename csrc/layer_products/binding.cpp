// Python's door to the products between two attentions: pointers and streams as integers (llama3/ops/layer_products.py
// takes them off the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "layer_products/launch.h"

namespace layer_products {
extern uintptr_t clocks_pointer;
}
namespace py = pybind11;
using namespace layer_products;

namespace {

void* pointer(uintptr_t address) {
    return reinterpret_cast<void*>(address);
}

}  // namespace

PYBIND11_MODULE(layer_products, module) {
    module.doc() = "Chains of matrix products for the tokens of a decode step; see llama3/ops/layer_products.py";
    module.attr("max_products") = kMaxProducts;
    module.attr("max_tokens") = kMaxTokens;
    using namespace py::literals;
    py::class_<Problem>(module, "Product")
        .def(py::init([](uintptr_t x, uintptr_t weight, uintptr_t out, int num_rows, int size, int form,
                         uintptr_t residual, uintptr_t norm, uintptr_t normed, uintptr_t squares) {
                 return Problem{pointer(x),   pointer(weight),        pointer(residual), pointer(norm),
                                pointer(out), pointer(normed),        pointer(squares),  num_rows,
                                size,         static_cast<Form>(form)};
             }),
             py::kw_only(), "x"_a, "weight"_a, "out"_a, "num_rows"_a, "size"_a, "form"_a, "residual"_a = 0,
             "norm"_a = 0, "normed"_a = 0, "squares"_a = 0);
    module.def("padded_tokens", &padded_tokens, "num_tokens"_a, "Tokens of the kernel that runs so many.");
    module.attr("words") = Words::kCount;
    module.attr("empty_word") = 0xFFFFFFFF;
    module.def("set_clocks", [](uintptr_t c) { clocks_pointer = c; });
    module.def(
        "sums", [](int blocks, int num_tokens) { return blocks * 2 * kTileRows * padded_tokens(num_tokens); },
        "blocks"_a, "num_tokens"_a, "Floats that the blocks of a launch exchange.");
    module.def(
        "share",
        [](int total, int block, int blocks) {
            const Range range = Range::of(total, block, blocks);
            return py::make_tuple(range.begin, range.end);
        },
        "total"_a, "block"_a, "blocks"_a, "The steps of a product that a block multiplies.");
    module.def(
        "finishers",
        [](int tile, int steps, int tiles, int blocks) {
            const Sharers sharers = Sharers::of(tile, steps, tiles * steps, blocks);
            std::vector<int> first;
            for (int rank = 0; rank <= sharers.count; ++rank) first.push_back(sharers.first_unit(rank));
            return py::make_tuple(sharers.first, sharers.count, first);
        },
        "tile"_a, "steps"_a, "tiles"_a, "blocks"_a,
        "The blocks that share a tile: the first, how many, and the first unit that each finishes.");
    module.def(
        "launch",
        [](const std::vector<Problem>& products, int num_tokens, float eps, uintptr_t words, uintptr_t sums, int blocks,
           int trigger, bool overlap, uintptr_t stream) {
            launch(products, num_tokens, eps, pointer(words), pointer(sums), blocks, trigger, overlap,
                   static_cast<cudaStream_t>(pointer(stream)));
        },
        "products"_a, "num_tokens"_a, "eps"_a, "words"_a, "sums"_a, "blocks"_a, "trigger"_a, "overlap"_a, "stream"_a);
}
