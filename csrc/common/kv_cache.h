// The KV cache: [num_blocks, num_kv_heads, kBlockSize, head_dim] of keys, and of values.
#pragma once

namespace common {

constexpr int kBlockSize = 64;  // tokens

}  // namespace common
