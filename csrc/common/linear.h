// The seam's products as one kernel each: what is asked for, in the same terms by every family that makes them. RMSNorm
// before a product is its weight, which is part of the product's, and a scale of each token.
#pragma once

namespace common {

constexpr int kPanelColumns = 64;  // of a matrix, 128 bytes, the swizzle's width: what is copied at a time

enum class Form : int { kNormLinear = 0, kLinearAdd = 1, kNormSwiGlu = 2, kLinear = 3 };

constexpr bool has_norm(Form form) {
    return form == Form::kNormLinear || form == Form::kNormSwiGlu;
}

// Sums of squares of tokens, [count, num_tokens], over parts of their columns: of x where a norm comes before the
// product, of out where one follows. Or null.
struct Squares {
    float* sums;
    int count;
};

struct Problem {
    const void *x, *weight;  // [num_tokens, size], [num_rows, size]
    const void* residual;    // or null
    void* out;
    int num_tokens, num_rows, size;
    float eps;
    Form form;
};

}  // namespace common
