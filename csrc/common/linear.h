// The seam's products as one kernel each: what is asked for, in the same terms by every family that makes them.
#pragma once

namespace common {

enum class Form : int { kNormLinear = 0, kLinearAdd = 1, kNormSwiGlu = 2 };

constexpr bool has_norm(Form form) {
    return form != Form::kLinearAdd;
}

struct Problem {
    const void *x, *weight;       // [num_tokens, size], [num_rows, size]
    const void *norm, *residual;  // or null
    void* out;
    int num_tokens, num_rows, size;
    float eps;
    Form form;
};

}  // namespace common
