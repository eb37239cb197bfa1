#include "batch_linear/instances.cuh"

template <>
const void* batch_linear::kernel_for<batch_linear::Form::kNormSwiGlu>(int tokens, bool tall) {
    return instantiate<Form::kNormSwiGlu>(tokens, tall);
}
