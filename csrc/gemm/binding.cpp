// Python's door to the large matrix products: pointers and the stream as integers (llama3/ops/gemm.py takes them off
// the tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "gemm/gemm.h"

namespace py = pybind11;

PYBIND11_MODULE(gemm, module) {
    module.doc() = "Matrix products of many tokens on wgmma; see llama3/ops/gemm.py";
    using namespace py::literals;
    module.def("workspace_bytes", &gemm::workspace_bytes, "clusters"_a);
    module.def(
        "gemm",
        [](uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int num_tokens, int num_rows, int size,
           int epilogue, int dtype, uintptr_t stream, int rows, int splits, int tokens, uintptr_t workspace,
           int64_t bytes) {
            gemm::launch({common::pointer(x), common::pointer(weight), common::pointer(residual), common::pointer(out),
                          num_tokens, num_rows, size, static_cast<gemm::Epilogue>(epilogue)},
                         {rows, splits, tokens}, {common::pointer(workspace), bytes},
                         {static_cast<common::Dtype>(dtype), common::stream_at(stream)});
        },
        "x"_a, "weight"_a, "residual"_a, "out"_a, "num_tokens"_a, "num_rows"_a, "size"_a, "epilogue"_a, "dtype"_a,
        "stream"_a, "rows"_a = 256, "splits"_a = 1, "tokens"_a = 128, "workspace"_a = 0, "workspace_bytes"_a = 0);
}
