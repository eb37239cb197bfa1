#include "batch_linear/instances.cuh"

template batch_linear::Kernel batch_linear::kernel_for<batch_linear::Form::kLinear>(int tokens, int tile_rows);
