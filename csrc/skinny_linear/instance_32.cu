#include "skinny_linear/instances.cuh"

template <>
const void* skinny_linear::kernel_for<4>(int grid, Form form) {
    return instantiate<4>(grid, form);
}
