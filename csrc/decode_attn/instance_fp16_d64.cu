// The kernel for fp16, head_dim 64. One file an instance: they compile in parallel.
#include "decode_attn/instances.cuh"

namespace decode_attn {
template const void* kernel_for<__half, 64>(Loader, bool);
}
