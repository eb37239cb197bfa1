#include "gemm/split_instances.cuh"

namespace gemm {

template SplitKernel select_split_kernel<__nv_bfloat16>(int rows, int splits, int shared);

}
