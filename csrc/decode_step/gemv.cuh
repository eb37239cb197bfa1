// The math warps' part of y = W x: multiply the chunks of W in the ring by a slice of x held in registers.
#pragma once
#include "decode_step/shared_state.cuh"

namespace decode_step {

// Keeps a value in a register: the compiler may not fetch it again from where it came.
__device__ __forceinline__ int pinned(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

struct GemvInput {
    const uint32_t* words;  // x as tagged words of use `use`, or null:
    uint32_t use;
    const bf16* row;        // then x is this row of the embedding
    const bf16* norm;       // elementwise factor, or null
};

// This lane's eight elements of each of the warp's units: x times the norm's weight. Returns its sum of x^2.
template <int U>
__device__ __forceinline__ float load_input(const GemvInput& in, int slice, int lane, float (&x)[U][8]) {
    uint4 factor[U];
    const int column = slice * U * kUnit + lane * 8;
    if (in.norm != nullptr) {
#pragma unroll
        for (int u = 0; u < U; ++u) factor[u] = __ldg(reinterpret_cast<const uint4*>(in.norm + column + u * kUnit));
    }
    if (in.words != nullptr) {
        uint4 v[2 * U];
        await(v, reinterpret_cast<const uint4*>(in.words) + slice * U * (kUnit / 4) + lane, [](int i) { return i * 32; }, in.use);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const uint4 a = v[2 * u], b = v[2 * u + 1];
            x[u][0] = untag(a.x), x[u][1] = untag(a.y), x[u][2] = untag(a.z), x[u][3] = untag(a.w);
            x[u][4] = untag(b.x), x[u][5] = untag(b.y), x[u][6] = untag(b.z), x[u][7] = untag(b.w);
        }
    } else {
#pragma unroll
        for (int u = 0; u < U; ++u) unpack(__ldg(reinterpret_cast<const uint4*>(in.row + column + u * kUnit)), x[u]);
    }
    float sum = 0.f;
    if (in.norm != nullptr) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float f[8];
            unpack(factor[u], f);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                sum = fmaf(x[u][e], x[u][e], sum);
                x[u][e] *= f[e];
            }
        }
    }
    return sum;
}

// Sums each of the first N values over the lanes that differ in the bits from kMask down to kLast, by halves: afterwards a
// lane holds max(1, N / lanes) sums, those whose index has the lane's bits on top.
template <int kMask, int kLast, int N>
__device__ __forceinline__ void transposed_sum(float* v, int lane) {
    if constexpr (N > 1) {
        constexpr int kHalf = N / 2;
        const bool upper = lane & kMask;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float sent = upper ? v[i] : v[i + kHalf];
            const float kept = upper ? v[i + kHalf] : v[i];
            v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kMask);
        }
        if constexpr (kMask > kLast) transposed_sum<kMask / 2, kLast, kHalf>(v, lane);
    } else {
        v[0] += __shfl_xor_sync(0xffffffffu, v[0], kMask);
        if constexpr (kMask > kLast) transposed_sum<kMask / 2, kLast, 1>(v, lane);
    }
}

// All rows of one projection that belong to this block. U units of columns a warp.
template <int U>
__device__ __forceinline__ void gemv(const Linear& linear, int op, const GemvInput& in, int num_rows, int warp, int lane,
                                     RingReader& ring, uint32_t& batch_count, SharedState& shared) {
    constexpr int kRows = rows_per_warp(U), kChunks = kBatchRows / kRows;
    constexpr int kSums = kRows >= 4 ? 1 : 4 / kRows;  // independent sums a row, so that four multiply-adds overlap
    const int slice = warp % linear.k_slices, group = warp / linear.k_slices;
    const int chunk_rows = pinned(linear.chunk_rows);
    const uint32_t row_bytes = pinned(linear.k * 2), chunk_bytes = chunk_rows * row_bytes;
    const uint32_t lane_offset = group * kRows * row_bytes + slice * U * (kUnit * 2) + lane * 16;

    PROFILE_BEGIN(op_began);
    float x[U][8];
    float sum_squares = load_input<U>(in, slice, lane, x);
    PROFILE_END(shared, op, op_began);
    bool first = true;
    for (int row = 0; row < num_rows; row += kChunks * chunk_rows) {
        float acc[kBatchRows];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (row + c * chunk_rows < num_rows) {
                PROFILE_BEGIN(wait_began);
                const uint32_t chunk = ring.acquire(chunk_bytes) + lane_offset;
                PROFILE_END(shared, 5 + op, wait_began);
                uint4 w[kRows][U];
#pragma unroll
                for (int r = 0; r < kRows; ++r)
#pragma unroll
                    for (int u = 0; u < U; ++u) w[r][u] = load_shared(chunk + r * row_bytes + u * (kUnit * 2));
                ring.release(chunk_bytes, lane);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    float sums[kSums] = {};
#pragma unroll
                    for (int u = 0; u < U; ++u) {
                        float f[8];
                        unpack(w[r][u], f);
#pragma unroll
                        for (int e = 0; e < 8; ++e) sums[e % kSums] = fmaf(f[e], x[u][e], sums[e % kSums]);
                    }
#pragma unroll
                    for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
                    acc[c * kRows + r] = sums[0];
                }
            } else {
#pragma unroll
                for (int r = 0; r < kRows; ++r) acc[c * kRows + r] = 0.f;
            }
        }
        if (first && in.norm != nullptr) {
#pragma unroll
            for (int mask = 16; mask > 0; mask >>= 1) sum_squares += __shfl_xor_sync(0xffffffffu, sum_squares, mask);
        }
        first = false;
        transposed_sum<16, 1, kBatchRows>(acc, lane);  // lanes 2 i and 2 i + 1 hold row i

        const uint32_t buffer = batch_count % kBatchBuffers, round = batch_count / kBatchBuffers;
        wait_phase(common::shared_address(&shared.batch_empty[buffer]), (round & 1) ^ 1);
        Batch& batch = shared.batch[buffer];
        if ((lane & 1) == 0) batch.part[warp][lane >> 1] = acc[0];
        if (lane == 1) batch.sum_squares[warp] = sum_squares;
        __syncwarp();
        if (lane == 0) common::mbarrier_arrive(common::shared_address(&shared.batch_full[buffer]));
        ++batch_count;
    }
    PROFILE_END(shared, 10 + op, op_began);
}

}  // namespace decode_step
