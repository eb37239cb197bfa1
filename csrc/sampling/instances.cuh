// Each dtype's kernels are compiled in a file of their own, in parallel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sampling/params.h"

namespace sampling {

template <typename T>
void (*kernel_of(Mode mode))(Params);

}  // namespace sampling

#define SAMPLING_INSTANCES(T)                           \
    template <>                                         \
    void (*sampling::kernel_of<T>(Mode mode))(Params) { \
        switch (mode) {                                 \
            case Mode::kGreedy:                         \
                return sample<T, Mode::kGreedy>;        \
            case Mode::kUnfiltered:                     \
                return sample<T, Mode::kUnfiltered>;    \
            default:                                    \
                return sample<T, Mode::kFiltered>;      \
        }                                               \
    }
