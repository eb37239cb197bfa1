// Python's door to the skinny matrix product: pointers and streams as integers (llama3/ops/skinny.py takes them off the
// tensors). std::invalid_argument arrives as ValueError, std::runtime_error as RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "linear/launch.h"

namespace py = pybind11;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void skinny(uintptr_t x, uintptr_t weight, uintptr_t norm_weight, uintptr_t residual, uintptr_t out, int num_tokens, int num_rows, int size,
            float eps, int epilogue, std::array<int, 3> wish, bool overlap, uintptr_t stream) {
    const linear::Problem problem{pointer(x), pointer(weight), pointer(norm_weight), pointer(residual), pointer(out),
                                  num_tokens, num_rows,        size,                 eps,               linear::Epilogue(epilogue)};
    linear::skinny(problem, {wish[0], wish[1], wish[2]}, overlap, pointer<std::remove_pointer_t<cudaStream_t>>(stream));
}

py::dict tiling(int num_tokens, int num_rows, int size, int epilogue, std::array<int, 4> clusters, int shared_limit, std::array<int, 3> wish) {
    const linear::Machine machine{{clusters[0], clusters[1], clusters[2], clusters[3]}, shared_limit};
    const linear::Tiling t = linear::choose_tiling(num_tokens, num_rows, size, linear::Epilogue(epilogue), machine, {wish[0], wish[1], wish[2]});
    using namespace py::literals;
    return py::dict("tile_rows"_a = t.tile_rows, "tiles"_a = t.tiles, "splits"_a = t.splits, "sharers"_a = t.sharers, "grid"_a = t.grid,
                    "stages"_a = t.stages, "shared_bytes"_a = t.shared_bytes, "one_tile"_a = t.one_tile);
}

// Clusters of 1, 2, 4 and 8 blocks that run at once on the current device.
std::array<int, 4> clusters() {
    const linear::Machine& machine = linear::this_machine();
    return {machine.clusters[0], machine.clusters[1], machine.clusters[2], machine.clusters[3]};
}

}  // namespace

PYBIND11_MODULE(linear, module) {
    module.doc() = "Matrix products for few tokens; see llama3/ops/skinny.py";
    module.attr("max_tokens") = linear::kMaxTokens;
    using namespace py::literals;
    module.def("skinny", &skinny, "x"_a, "weight"_a, "norm_weight"_a, "residual"_a, "out"_a, "num_tokens"_a, "num_rows"_a, "size"_a, "eps"_a,
               "epilogue"_a, "wish"_a, "overlap"_a, "stream"_a);
    module.def("tiling", &tiling, "num_tokens"_a, "num_rows"_a, "size"_a, "epilogue"_a, "clusters"_a, "shared_limit"_a,
               "wish"_a);
    module.def("clusters", &clusters);
}
