// One translation unit a form, so that they compile in parallel.
#pragma once
#include "batch_linear/kernel.cuh"

namespace batch_linear {

// The kernel for `tokens`, which is one of kTokenCounts, and for tiles of more than kShortRows or not.
template <Form kForm>
const void* kernel_for(int tokens, bool tall);

template <int kTokens, Form kForm>
const void* instantiate(bool tall) {
    if constexpr (may_be_tall(kForm, kTokens))
        if (tall) return reinterpret_cast<const void*>(batch_linear_kernel<kTokens, kForm, true>);
    return reinterpret_cast<const void*>(batch_linear_kernel<kTokens, kForm, false>);
}

template <Form kForm>
const void* instantiate(int tokens, bool tall) {
    switch (tokens) {
        case 32:
            return instantiate<32, kForm>(tall);
        case 48:
            return instantiate<48, kForm>(tall);
        case 64:
            return instantiate<64, kForm>(tall);
        case 96:
            return instantiate<96, kForm>(tall);
        default:
            return instantiate<128, kForm>(tall);
    }
}

}  // namespace batch_linear
