// One translation unit a form, so that they compile in parallel.
#pragma once
#include "batch_linear/kernel.cuh"

namespace batch_linear {

// The kernel for `tokens`, which is one of kTokenCounts.
template <Form kForm>
const void* kernel_for(int tokens);

template <Form kForm>
const void* instantiate(int tokens) {
    switch (tokens) {
        case 32:
            return reinterpret_cast<const void*>(batch_linear_kernel<32, kForm>);
        case 48:
            return reinterpret_cast<const void*>(batch_linear_kernel<48, kForm>);
        case 64:
            return reinterpret_cast<const void*>(batch_linear_kernel<64, kForm>);
        case 96:
            return reinterpret_cast<const void*>(batch_linear_kernel<96, kForm>);
        default:
            return reinterpret_cast<const void*>(batch_linear_kernel<128, kForm>);
    }
}

}  // namespace batch_linear
