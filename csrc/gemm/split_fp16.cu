#include "gemm/split_instances.cuh"

namespace gemm {

template SplitKernel select_split_kernel<__half>(int rows, int splits, int shared);

}
