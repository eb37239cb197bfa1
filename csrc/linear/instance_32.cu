#include "linear/instances.cuh"

namespace linear {

template <>
const void* kernel_for<32>(bool norm, Epilogue epilogue) {
    return instantiate<32>(norm, epilogue);
}

}  // namespace linear
