#include "layer_products/kernel.cuh"

namespace layer_products {

template <int kTokens>
const void* kernel_for();

template <>
const void* kernel_for<64>() {
    return reinterpret_cast<const void*>(layer_products_kernel<64>);
}
template <>
const void* kernel_for<128>() {
    return reinterpret_cast<const void*>(layer_products_kernel<128>);
}

}  // namespace layer_products
