#include "sampling/instances.cuh"
#include "sampling/kernel.cuh"

SAMPLING_INSTANCES(float)
