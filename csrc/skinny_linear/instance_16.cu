#include "skinny_linear/instances.cuh"

template <>
const void* skinny_linear::kernel_for<2>(int grid, Form form) {
    return instantiate<2>(grid, form);
}
