// The slower versions of launch.h's ladder (ladder.cu).
#pragma once
#include <algorithm>

#include "decode_attn/launch.h"

namespace decode_attn {

// Into how many parts a version cuts every context.
int ladder_parts(Version version, int batch, int num_heads, int num_kv_heads, int grid);

void launch_ladder(const Params& params, const Launch& how);

}  // namespace decode_attn
