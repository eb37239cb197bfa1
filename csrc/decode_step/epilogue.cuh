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

// Sums a batch's partial products over warps and segments into shared.row_sum. A group of warps has kBatchRows slots,
// which are rows in the order (chunk, row of the group in the chunk). Four lanes take four slots each, eight such teams
// share the segments.
__device__ __forceinline__ void sum_batch(const Linear& linear, const Batch& batch, int lane, float* row_sum) {
    static_assert(kBatchRows == 16, "four lanes of four slots");
    const int quad = lane & 3, team = lane >> 2;
    for (int group = 0; group < 1 << linear.group_bits; ++group) {
        const float4* part = reinterpret_cast<const float4*>(batch.part[group * linear.k_slices * 8 + team]) + quad;
        float v[4] = {};
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w)
            if (w < linear.k_slices) {
                const float4 p = part[w * 8 * (kBatchRows / 4)];
                v[0] += p.x, v[1] += p.y, v[2] += p.z, v[3] += p.w;
            }
        const auto halve = [lane](float low, float high, int mask) {
            const bool upper = lane & mask;
            return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
        };
        const float a = halve(v[0], v[2], 16), b = halve(v[1], v[3], 16);
        float sum = halve(a, b, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        const int slot = quad * 4 + (lane >> 4) * 2 + (lane >> 3 & 1), row_mask = (1 << linear.row_bits) - 1;
        if ((lane & 4) == 0)
            row_sum[((slot >> linear.row_bits << linear.group_bits) + group << linear.row_bits) + (slot & row_mask)] =
                sum;
    }
    __syncwarp();
}

__device__ __forceinline__ void finish_op(const Params& p, int op, int layer, const Step& step, int token, int lane,
                                          uint32_t& batch_count, SharedState& shared) {
    const Linear& linear = p.linear[op];
    const Rows rows = rows_of_block(linear, op, layer, blockIdx.x, gridDim.x);
    const uint32_t use = step.first_use + layer;
    const int batch_rows = kBatchRows * (kMathWarps / linear.k_slices);
    const bool adds = op == kO || op == kDown;
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
                if (w < linear.k_slices) squares += batch.sum_squares[w];
            scale = rsqrtf(squares / p.hidden_size + p.rms_norm_eps);
        }
        sum_batch(linear, batch, lane, shared.row_sum);
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(common::shared_address(&shared.batch_empty[buffer]));
        ++batch_count;
        for (int r = lane; r < count; r += 32) {
            const int row = rows.begin + first + r;
            const float value = shared.row_sum[r] * scale;
            if (op == kGateUp) {  // gate in the lower, up in the upper 8 of 16 rows
                if ((r & 8) == 0) {
                    const int index = row / 16 * 8 + row % 8;
                    const float up = shared.row_sum[r + 8] * scale;
                    publish(p.act + packet_index(index), value / (1.f + __expf(-value)) * up, use);
                }
            } else if (op == kQkv) {
                publish(p.qkv + row, value, use);
            } else if (op == kHead) {
                if (p.logits != nullptr) __stcs(p.logits + row, value);
                if (p.draws) best = better(best, {Sampler::load(p, step.position + 1).score(value, row), row});
            } else {
                if (r != lane) added = residual(p, op, layer, step, token, row);
                publish((op == kO ? p.x_mlp : p.x_attn) + packet_index(row), added + value, use);
            }
        }
        __syncwarp();  // row_sum is written again
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

__device__ inline void run_epilogue(const Params& p, int lane, SharedState& shared) {
    uint32_t batch_count = 0;
    int token = static_cast<int>(*p.token_id);
    bool ended = false;
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
        if (index > 0) {
            token = drawn_token(p, step.number - 1);
            if (blockIdx.x == 0 && lane == 0) ended |= record(p, index - 1, step.position, token);
        }
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            finish_op(p, op, layer, step, token, lane, batch_count, shared);
        }
    }
    // Block 0 leaves the state for the next launch. All blocks have read the old one: they have published candidates.
    if (blockIdx.x != 0) return;
    const Step next = make_step(p, shared, p.num_steps);
    if (p.draws) {
        token = drawn_token(p, next.number - 1);
        if (lane != 0) return;
        ended |= record(p, p.num_steps - 1, next.position, token);
        *p.token_id = token;
        *p.position = ended ? -1 : next.position;
    }
    if (lane == 0) *p.steps_done = next.number - 1;
}

}  // namespace decode_step
