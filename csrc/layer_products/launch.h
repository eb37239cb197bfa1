// The host side of the products between two attentions. No torch, no allocation, no synchronisation.
#pragma once
#include <cuda_runtime_api.h>

#include <vector>

#include "layer_products/params.h"

namespace layer_products {

// One product of the chain as the caller sees it. linear_add: `residual`, and with `norm` (of the product that follows)
// also `normed` and `squares`, which that product takes as its `x` and `squares`.
struct Problem {
    const void *x, *weight, *residual, *norm;
    void *out, *normed, *squares;
    int num_rows, size;
    Form form;
};

// Products in order, for `num_tokens` rows of each x. `words` and `sums`: a workspace of words_bytes(), zero before the
// first launch, and sums_bytes(); launches that may run at the same time need one each. Throws std::invalid_argument
// for what the kernel does not support (before any CUDA call), std::runtime_error if CUDA fails. `overlap`:
// programmatic dependent launch.
void launch(const std::vector<Problem>& problems, int num_tokens, float eps, void* words, void* sums, int blocks,
            int trigger, bool overlap, cudaStream_t stream);

}  // namespace layer_products
