#include "skinny_linear/instances.cuh"

template <>
const void* skinny_linear::kernel_for<1>(int grid, Form form) {
    return instantiate<1>(grid, form);
}
