#include "linear/instances.cuh"

namespace linear {

template <>
const void* kernel_for<16>(bool norm, Epilogue epilogue) {
    return instantiate<16>(norm, epilogue);
}

}  // namespace linear
