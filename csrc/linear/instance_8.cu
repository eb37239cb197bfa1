#include "linear/instances.cuh"

namespace linear {

template <>
const void* kernel_for<8>(bool norm, Epilogue epilogue) {
    return instantiate<8>(norm, epilogue);
}

}  // namespace linear
