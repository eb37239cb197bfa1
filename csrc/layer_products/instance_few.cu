#include "layer_products/kernel.cuh"

namespace layer_products {

template <int kTokens>
const void* kernel_for();

template <>
const void* kernel_for<16>() {
    return reinterpret_cast<const void*>(layer_products_kernel<16>);
}
template <>
const void* kernel_for<32>() {
    return reinterpret_cast<const void*>(layer_products_kernel<32>);
}

}  // namespace layer_products
