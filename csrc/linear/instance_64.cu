#include "linear/instances.cuh"

namespace linear {

template <>
const void* kernel_for<64>(bool norm, Epilogue epilogue) {
    return instantiate<64>(norm, epilogue);
}

}  // namespace linear
