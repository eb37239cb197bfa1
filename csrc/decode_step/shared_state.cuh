// What lies in a block's shared memory besides the ring, and what every role knows about the step.
#pragma once
#include "decode_step/ring.cuh"

namespace decode_step {

// Partial sums of a batch of rows on their way from the math warps to the epilogue warp.
struct alignas(16) Batch {
    float part[kMathWarps * 8][kBatchRows];  // of each warp's 8 segments of columns
    float sum_squares[kMathWarps];           // of each warp's slice of x
};

// What blocks tell each other to draw a token: of themselves, then of all.
struct Ballot {
    uint64_t best;          // sampling::pack_candidate of the greatest perturbed score
    uint64_t total, above;  // weight of all, and of those with a greater score than the one in question
    float score;            // of the best, not perturbed
    uint32_t top;           // sampling::ordered_for_max of the greatest logit
};

struct SharedState {
    RingBarriers ring;
    uint64_t batch_full[kBatchBuffers], batch_empty[kBatchBuffers];
    Batch batch[kBatchBuffers];
    float row_sum[kBatchRows * kMathWarps];  // of the batch in the epilogue warp's hands
    Ballot ballots[2][kMathWarps];
    uint64_t head_done, token_drawn;  // phase n ends in step n of the launch
    int position;                     // of the launch's first step
    uint32_t steps_done;              // before this launch
    int token;                        // last drawn
    uint32_t rounds_done;
    int64_t profile[32];
};

// What this block has to do with one projection; a table of them, in the order of a step, follows SharedState. It is
// worked out once a launch: divisions and pointer chasing in every role would cost more than their time, their code
// would not stay in the instruction cache.
struct Work {
    const bf16* weights;  // the block's rows of the matrix
    const bf16* norm;     // factor of the input, or null: none, or part of the weights
    int row, num_rows;    // the first row and how many
};

__host__ __device__ constexpr int num_works(int num_layers) {
    return 4 * num_layers + 1;
}

__host__ __device__ constexpr int align_up(int bytes) {
    return (bytes + 127) / 128 * 128;
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
// 16 tiles, 17 combine, 18 wait for other splits; 20 epilogue: wait for math; 21 whole kernel.

}  // namespace decode_step
