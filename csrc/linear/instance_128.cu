#include "linear/instances.cuh"

namespace linear {

template <>
const void* kernel_for<128>(bool norm, Epilogue epilogue) {
    return instantiate<128>(norm, epilogue);
}

}  // namespace linear
