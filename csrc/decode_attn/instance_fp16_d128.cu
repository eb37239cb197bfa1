// The kernel for fp16, head_dim 128. One file an instance: they compile in parallel.
#include "decode_attn/instances.cuh"

namespace decode_attn {
template const void* kernel_for<__half, 128>(Loader, bool);
}
