// One translation unit a token count, so that they compile in parallel.
#pragma once
#include "linear/skinny.cuh"

namespace linear {

using Kernel = void (*)(CUtensorMap, CUtensorMap, Params);

// Null for what nothing uses: only a normed product has the SwiGLU epilogue, only a plain one adds a residual.
template <int kTokens>
const void* kernel_for(bool norm, Epilogue epilogue);

template <int kTokens>
const void* instantiate(bool norm, Epilogue epilogue) {
    if (norm && epilogue == Epilogue::kStore) return reinterpret_cast<const void*>(skinny_kernel<kTokens, true, Epilogue::kStore>);
    if (norm && epilogue == Epilogue::kSwiGlu) return reinterpret_cast<const void*>(skinny_kernel<kTokens, true, Epilogue::kSwiGlu>);
    if (!norm && epilogue == Epilogue::kAdd) return reinterpret_cast<const void*>(skinny_kernel<kTokens, false, Epilogue::kAdd>);
    return nullptr;
}

}  // namespace linear
