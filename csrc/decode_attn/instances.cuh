// Picks a compiled kernel; defined for every (T, kHeadDim) of the instance_*.cu files.
#pragma once
#include "decode_attn/kernel.cuh"

namespace decode_attn {

template <typename T, int kHeadDim>
const void* kernel_for(Loader loader, bool fused) {
    if (loader == Loader::kTma) {
        return fused ? reinterpret_cast<const void*>(&decode_attn_kernel<T, kHeadDim, Loader::kTma, true>)
                     : reinterpret_cast<const void*>(&decode_attn_kernel<T, kHeadDim, Loader::kTma, false>);
    }
    return fused ? reinterpret_cast<const void*>(&decode_attn_kernel<T, kHeadDim, Loader::kCpAsync, true>)
                 : reinterpret_cast<const void*>(&decode_attn_kernel<T, kHeadDim, Loader::kCpAsync, false>);
}

}  // namespace decode_attn
