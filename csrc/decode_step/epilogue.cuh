// The epilogue warp: sums the math warps' partial rows, finishes each operation, and publishes it to all blocks.
#pragma once
#include "decode_step/sampling.cuh"
#include "decode_step/shared_state.cuh"

namespace decode_step {

// Residual stream of `row` before this operation.
__device__ __forceinline__ float residual(const Params& p, int op, int layer, const Step& step, int token, int row) {
    if (op == kDown) return await(p.x_mlp + packet_index(row), step.first_use + layer);
    if (layer == 0) return __bfloat162float(p.embed[static_cast<int64_t>(token) * p.hidden_size + row]);
    return await(p.x_attn + packet_index(row), step.first_use + layer - 1);
}

// Where the partial sums of a batch's rows are. All counts are powers of two.
struct BatchLayout {
    int row_bits, group_bits, k_slices;  // log2 of rows a warp takes of a chunk, of groups of warps; warps that share a row

    __device__ explicit BatchLayout(const Linear& linear)
        : row_bits(linear.row_bits), group_bits(linear.group_bits), k_slices(linear.k_slices) {}

    __device__ __forceinline__ float sum_row(const Batch& batch, int r) const {
        const int group = (r >> row_bits) & ((1 << group_bits) - 1);
        const int slot = (r >> (row_bits + group_bits) << row_bits) + (r & ((1 << row_bits) - 1));
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w)
            if (w < k_slices) sum += batch.part[group * k_slices + w][slot];
        return sum;
    }
};

__device__ __forceinline__ void finish_op(const Params& p, int op, int layer, const Step& step, int token, int lane,
                                          const Sampler& sampler, uint32_t& batch_count, SharedState& shared) {
    const Linear& linear = p.linear[op];
    const Rows rows = rows_of_block(linear, op, layer, blockIdx.x, gridDim.x);
    const uint32_t use = step.first_use + layer;
    const int batch_rows = kBatchRows * (kMathWarps / linear.k_slices);
    const bool adds = op == kO || op == kDown;
    const BatchLayout layout(linear);
    Candidate best{0.f, -1};
    for (int first = 0; first < rows.count; first += batch_rows) {
        const uint32_t buffer = batch_count % kBatchBuffers, round = batch_count / kBatchBuffers;
        const Batch& batch = shared.batch[buffer];
        const int count = min(batch_rows, rows.count - first);
        // Loaded before the wait, while the math warps are still at it.
        float added = adds && lane < count ? residual(p, op, layer, step, token, rows.begin + first + lane) : 0.f;
        PROFILE_BEGIN(wait_began);
        wait_phase(common::shared_address(&shared.batch_full[buffer]), round & 1);
        PROFILE_END(shared, 20, wait_began);
        float scale = 1.f;
        if (!adds) {
            float squares = 0.f;
#pragma unroll
            for (int w = 0; w < kMathWarps; ++w)
                if (w < layout.k_slices) squares += batch.sum_squares[w];
            scale = rsqrtf(squares / p.hidden_size + p.rms_norm_eps);
        }
        for (int r = lane; r - lane < count; r += 32) {
            const bool exists = r < count;
            const int row = rows.begin + first + r;
            float value = layout.sum_row(batch, min(r, batch_rows - 1)) * scale;
            if (op == kGateUp) {  // gate in the lower, up in the upper 8 of 16 rows
                const float up = __shfl_down_sync(0xffffffffu, value, 8);
                if (exists && (r & 8) == 0) {
                    const int index = row / 16 * 8 + row % 8;
                    publish(p.act + packet_index(index), value / (1.f + __expf(-value)) * up, use);
                }
            } else if (!exists) {
                continue;
            } else if (op == kQkv) {
                publish(p.qkv + row, value, use);
            } else if (op == kHead) {
                if (p.logits != nullptr) __stcs(p.logits + row, value);
                if (p.draws) best = better(best, {sampler.score(value, row), row});
            } else {
                if (r != lane) added = residual(p, op, layer, step, token, row);
                publish((op == kO ? p.x_mlp : p.x_attn) + packet_index(row), added + value, use);
            }
        }
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(common::shared_address(&shared.batch_empty[buffer]));
        ++batch_count;
    }
    if (op == kHead && p.draws) {
        best = warp_best(best);
        if (lane == 0) publish_candidate(p, best, step.number);
    }
}

// One block's record of a drawn token, and whether it ends the row.
__device__ __forceinline__ bool record(const Params& p, int index, int position, int token) {
    p.drawn[index] = token;
    if (p.stop_ids == nullptr) return false;
    bool ended = position > *p.last_position;
    if (position >= *p.first_stop_position)
        for (int i = 0; i < p.num_stop_ids; ++i) ended |= p.stop_ids[i] == token;
    return ended;
}

__device__ inline void run_epilogue(const Params& p, int position, uint32_t steps_done, int lane, SharedState& shared) {
    uint32_t batch_count = 0;
    int token = static_cast<int>(*p.token_id);
    bool ended = false;
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, position, steps_done, index);
        if (index > 0) {
            token = drawn_token(p, step.number - 1);
            if (blockIdx.x == 0 && lane == 0) ended |= record(p, index - 1, step.position, token);
        }
        const Sampler sampler = Sampler::load(p, step.position + 1);
        for (int i = 0; i < 4 * p.num_layers; ++i)
            finish_op(p, i & 3, i >> 2, step, token, lane, sampler, batch_count, shared);
        finish_op(p, kHead, p.num_layers, step, token, lane, sampler, batch_count, shared);
    }
    // Block 0 leaves the state for the next launch. All blocks have read the old one: they have published candidates.
    if (blockIdx.x != 0) return;
    if (p.draws) {
        token = drawn_token(p, steps_done + p.num_steps);
        if (lane != 0) return;
        ended |= record(p, p.num_steps - 1, position + p.num_steps, token);
        *p.token_id = token;
        *p.position = ended ? -1 : position + p.num_steps;
    }
    if (lane == 0) *p.steps_done = steps_done + p.num_steps;
}

}  // namespace decode_step
