// The epilogue warp: sums the math warps' partial rows, finishes each operation, and publishes it to all blocks.
#pragma once
#include "decode_step/draw.cuh"

namespace decode_step {

// Residual stream of `row` before this operation.
__device__ __forceinline__ float residual(const Params& p, int op, int layer, const Step& step, int token, int row) {
    if (op == kDown) return await(p.x_mlp + packet_index(row), step.first_use + layer);
    if (layer == 0) return __bfloat162float(p.embed[static_cast<int64_t>(token) * p.hidden_size + row]);
    return await(p.x_attn + packet_index(row), step.first_use + layer - 1);
}

// Over the warps that share rows. The epilogue is on the way of every exchange, so all loads are under way at once.
template <int kSlices>
__device__ __forceinline__ float4 sum_of_warps(const float4* part) {
    float4 v[kSlices];
#pragma unroll
    for (int w = 0; w < kSlices; ++w) v[w] = part[w * 8 * (kBatchRows / 4)];
#pragma unroll
    for (int w = 1; w < kSlices; ++w) v[0].x += v[w].x, v[0].y += v[w].y, v[0].z += v[w].z, v[0].w += v[w].w;
    return v[0];
}

// Sums a batch's partial products over warps and segments into shared.row_sum. A group of warps has kBatchRows slots,
// which are rows in the order (chunk, row of the group in the chunk). Four lanes take four slots each, eight such teams
// share the segments.
__device__ __forceinline__ void sum_batch(const Linear& linear, const Batch& batch, int lane, float* row_sum) {
    static_assert(kBatchRows == 16, "four lanes of four slots");
    const int quad = lane & 3, team = lane >> 2;
#pragma unroll 1
    for (int group = 0; group < 1 << linear.group_bits; ++group) {
        const float4* part = reinterpret_cast<const float4*>(batch.part[group * linear.k_slices * 8 + team]) + quad;
        const float4 v = linear.k_slices == 8   ? sum_of_warps<8>(part)
                         : linear.k_slices == 4 ? sum_of_warps<4>(part)
                         : linear.k_slices == 2 ? sum_of_warps<2>(part)
                                                : sum_of_warps<1>(part);
        const auto halve = [lane](float low, float high, int mask) {
            const bool upper = lane & mask;
            return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
        };
        const float a = halve(v.x, v.z, 16), b = halve(v.y, v.w, 16);
        float sum = halve(a, b, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        const int slot = quad * 4 + (lane >> 4) * 2 + (lane >> 3 & 1), row_mask = (1 << linear.row_bits) - 1;
        if ((lane & 4) == 0)
            row_sum[((slot >> linear.row_bits << linear.group_bits) + group << linear.row_bits) + (slot & row_mask)] =
                sum;
    }
    __syncwarp();
}

__device__ __forceinline__ void finish_op(const Params& p, const Work& work, int op, int layer, const Step& step,
                                          int token, HeadRows& head, int lane, uint32_t& batch_count,
                                          SharedState& shared) {
    const Linear& linear = p.linear[op];
    const Rows rows = {work.row, work.num_rows};
    const uint32_t use = step.first_use + layer;
    const int batch_rows = kBatchRows * (kMathWarps / linear.k_slices);
    const bool adds = adds_residual(op);
    const bool draws = op == kHead && p.draws;
    Ballot mine{};
    Noise generator{};
    if (draws) generator = Noise::load(p, step.position + 1);
    for (int first = 0; first < rows.count; first += batch_rows) {
        const uint32_t buffer = batch_count % kBatchBuffers, round = batch_count / kBatchBuffers;
        const Batch& batch = shared.batch[buffer];
        const int count = min(batch_rows, rows.count - first);
        // Loaded before the wait, while the math warps are still at it.
        float added = 0.f;  // residual or noise
        if (adds && lane < count) added = residual(p, op, layer, step, token, rows.begin + first + lane);
        if (draws) added = generator.of(rows.begin + first + lane);
        PROFILE_BEGIN(wait_began);
        wait_phase(common::shared_address(&shared.batch_full[buffer]), round & 1);
        PROFILE_END(shared, 20, wait_began);
        float scale = 1.f;
        if (!adds) {
            float of_warp[kMathWarps], squares = 0.f;
#pragma unroll
            for (int w = 0; w < kMathWarps; ++w) of_warp[w] = batch.sum_squares[w];
#pragma unroll
            for (int w = 0; w < kMathWarps; ++w) squares += w < linear.k_slices ? of_warp[w] : 0.f;
            scale = rsqrtf(__fdividef(squares, p.hidden_size) + p.rms_norm_eps);
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
                    publish(p.act + packet_index(index), __fdividef(value, 1.f + __expf(-value)) * up, use);
                }
            } else if (op == kQkv) {
                publish(p.qkv + row, value, use);
            } else if (op == kHead) {
                if (p.logits != nullptr) __stcs(p.logits + row, value);
                if (draws) {
                    if (r != lane) added = generator.of(row);
                    const float score = generator.score(value), perturbed = score + added;
                    head.logit[first + r] = value;
                    head.score[first + r] = score;
                    head.perturbed[first + r] = perturbed;
                    mine.best = max(mine.best, sampling::pack_candidate(sampling::ordered_for_max(perturbed), row));
                    mine.top = max(mine.top, sampling::ordered_for_max(value));
                }
            } else {
                if (r != lane) added = residual(p, op, layer, step, token, row);
                publish((op == kO ? p.x_mlp : p.x_attn) + packet_index(row), added + value, use);
            }
        }
        __syncwarp();  // row_sum is written again
    }
    if (draws) {
        mine = joined(mine);
        __syncwarp();
        if (rows.count > 0) mine.score = head.score[static_cast<int>(sampling::candidate_id(mine.best)) - rows.begin];
        publish_ballot(p, mine, *static_cast<const volatile uint32_t*>(&shared.rounds_done), lane);
        if (lane == 0) common::mbarrier_arrive(common::shared_address(&shared.head_done));
    }
}

__device__ inline void run_epilogue(const Params& p, const Work* works, HeadRows& head, int lane, SharedState& shared) {
    uint32_t batch_count = 0;
    int token = static_cast<int>(*p.token_id);
    int ended = 0;
    for (int index = 0; index < p.num_steps; ++index) {
        const Step step = make_step(p, shared, index);
#pragma unroll 1
        for (int i = 0; i <= 4 * p.num_layers; ++i) {
            const int layer = i >> 2, op = layer == p.num_layers ? static_cast<int>(kHead) : i & 3;
            finish_op(p, works[i], op, layer, step, token, head, lane, batch_count, shared);
        }
        if (!p.draws) continue;
        wait_phase(common::shared_address(&shared.token_drawn), index & 1);
        token = *static_cast<const volatile int*>(&shared.token);
        if (blockIdx.x == 0 && lane == 0) ended = pinned(ended | record(p, index, step.position + 1, token));
    }
    // Block 0 leaves the state for the next launch. All blocks have read the old one: what they published shows it.
    if (blockIdx.x == 0 && lane == 0) {
        const Step next = make_step(p, shared, p.num_steps);
        p.steps_done[0] = next.number - 1;
        p.steps_done[1] = *static_cast<const volatile uint32_t*>(&shared.rounds_done);
        if (p.draws) {
            *p.token_id = token;
            *p.position = ended ? -1 : next.position;
        }
    }
}

}  // namespace decode_step
