// What lies in a block's shared memory besides the ring, and what every role knows about the step.
#pragma once
#include "decode_step/ring.cuh"

namespace decode_step {

// Partial sums of a batch of rows on their way from the math warps to the epilogue warp.
struct alignas(16) Batch {
    float part[kMathWarps * 8][kBatchRows];  // of each warp's 8 segments of columns
    float sum_squares[kMathWarps];           // of each warp's slice of x
};

struct SharedState {
    RingBarriers ring;
    uint64_t batch_full[kBatchBuffers], batch_empty[kBatchBuffers];
    Batch batch[kBatchBuffers];
    float row_sum[kBatchRows * kMathWarps];  // of the batch in the epilogue warp's hands
    int position;                            // of the launch's first step
    uint32_t steps_done;                     // before this launch
    int64_t profile[32];
};

// After SharedState: attention's scratch (q fp32, new k and v bf16, the warps' partial outputs, their max and sum),
// then the layers' pointers, then the ring.
struct AttentionScratch {
    float* q;       // [group, D]
    bf16 *k, *v;    // [D] each, the new token's
    float* out;     // [kMathWarps, group, D]
    float2* state;  // [kMathWarps, group]
};

__host__ __device__ constexpr int align_up(int bytes) {
    return (bytes + 127) / 128 * 128;
}
__host__ __device__ constexpr int attention_scratch_bytes(int head_dim, int group) {
    return align_up(group * head_dim * 4 + 2 * head_dim * 2 + kMathWarps * group * (head_dim * 4 + 8));
}

template <int D, int GP>
__device__ __forceinline__ AttentionScratch attention_scratch(unsigned char* memory) {
    AttentionScratch s;
    s.q = reinterpret_cast<float*>(memory);
    s.out = s.q + GP * D;
    s.state = reinterpret_cast<float2*>(s.out + kMathWarps * GP * D);
    s.k = reinterpret_cast<bf16*>(s.state + kMathWarps * GP);
    s.v = s.k + D;
    return s;
}

// The same on every warp of every block: what one step works on, and which tags it uses.
struct Step {
    int position;        // index of the new token
    uint32_t first_use;  // use number of layer 0's words; layer l has first_use + l
    uint32_t number;     // 1, 2, ...: of all steps ever made
};

__device__ __forceinline__ Step make_step(const Params& p, const SharedState& shared, int index) {
    // From shared memory each time: not worth registers that stay taken.
    const uint32_t number = *static_cast<const volatile uint32_t*>(&shared.steps_done) + index + 1;
    return {*static_cast<const volatile int*>(&shared.position) + index, (number - 1) * p.num_layers + 1, number};
}

// ---- Cycle counts of one block, in builds that ask for them.
#ifdef DECODE_STEP_PROFILE
#define PROFILE_BEGIN(name) const int64_t name = clock64()
#define PROFILE_END(state, slot, name)   \
    if (threadIdx.x % kMathThreads == 0) \
    (state).profile[slot] += clock64() - (name)  // math warp 0 and the epilogue warp
#else
#define PROFILE_BEGIN(name)
#define PROFILE_END(state, slot, name)
#endif
// Slots: 0-4 wait for x by op, 5-9 wait for weights by op, 10-14 whole op (math warp 0); 15 attention: wait for q,
// 16 tiles, 17 combine, 18 wait for other splits; 19 loader: ring full; 20 epilogue: wait for math; 21 whole kernel.

}  // namespace decode_step
