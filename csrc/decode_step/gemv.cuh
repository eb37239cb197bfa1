// The math warps' part of y = W x: multiply the chunks of W in the ring by a slice of x held in registers.
#pragma once
#include "common/types.cuh"
#include "decode_step/shared_state.cuh"

namespace decode_step {

struct GemvInput {
    const uint32_t* words;  // x as tagged words of use `use`, or null:
    uint32_t use;
    const bf16* row;   // then x is this row of the embedding
    const bf16* norm;  // elementwise factor, or null
    bool normed;       // the sum of squares of x is wanted
};

// This lane's eight elements of each of the warp's units: x times `norm`. Returns its sum of x^2, if wanted.
template <int U>
__device__ __forceinline__ float load_input(const GemvInput& in, int slice, int lane, float (&x)[U][8]) {
    uint4 factor[U] = {};
    const int column = slice * U * kUnit + lane * 8;
    if (in.norm != nullptr) {
#pragma unroll
        for (int u = 0; u < U; ++u) factor[u] = __ldg(reinterpret_cast<const uint4*>(in.norm + column + u * kUnit));
    }
    if (in.words != nullptr) {
        uint4 v[2 * U];
        const uint4* words = reinterpret_cast<const uint4*>(in.words) + slice * U * (kUnit / 4) + lane;
        await(v, [words](int i) { return words + i * 32; }, in.use);
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
    if (in.normed) {
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int e = 0; e < 8; ++e) sum = fmaf(x[u][e], x[u][e], sum);
    }
    if (in.norm != nullptr) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float f[8];
            unpack(factor[u], f);
#pragma unroll
            for (int e = 0; e < 8; ++e) x[u][e] *= f[e];
        }
    }
    return sum;
}

// x as the tensor core's left operand, 16 x 16 tiles. The columns of a unit fall into 8 segments of 32, one for each
// group of four lanes. Row n of a tile is segment n of x in bf16, row 8 + n what bf16 leaves over of it: two exact
// products accumulated in fp32 lose 2^-17 of x instead of 2^-9.
template <int U>
struct SplitInput {
    uint32_t tile[U][2][4];

    __device__ __forceinline__ void set(const float (&x)[U][8]) {
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float a = x[u][2 * i], b = x[u][2 * i + 1];
                const uint32_t high = common::Pack<bf16>::from_floats(a, b);
                tile[u][i / 2][i % 2 * 2] = high;
                tile[u][i / 2][i % 2 * 2 + 1] =
                    common::Pack<bf16>::from_floats(a - bf16_low(high), b - bf16_high(high));
            }
    }
};

// c += a b, 16 x 16 by 16 x 8. Column n of b is segment n of a row of weights: every lane multiplies just the 16 bytes
// that it loaded, which are contiguous over the warp. c's two diagonals hold the products that are wanted, the rest is
// discarded.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The products of R rows with the warp's slice of x, one of the 8 segments in each lane that is_diagonal, rubbish in
// others.
__device__ __forceinline__ bool is_diagonal(int lane) {
    return (lane & 3) == lane >> 3;
}

template <int U, int R>
__device__ __forceinline__ void multiply_rows(const uint4 (&w)[R][U], const SplitInput<U>& x, int lane,
                                              float (&out)[R]) {
    constexpr int kChains = R >= 4 ? 1 : R >= 2 ? 2 : 4;  // at least four independent accumulators
    float c[R][kChains][4] = {};
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
        for (int r = 0; r < R; ++r) {
            multiply(c[r][2 * u % kChains], x.tile[u][0], w[r][u].x, w[r][u].y);
            multiply(c[r][(2 * u + 1) % kChains], x.tile[u][1], w[r][u].z, w[r][u].w);
        }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int i = 1; i < kChains; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[r][0][e] += c[r][i][e];
        out[r] = (lane & 4) ? c[r][0][1] + c[r][0][3] : c[r][0][0] + c[r][0][2];
    }
}

template <int R>
__device__ __forceinline__ void store_floats(float* to, const float (&v)[R]) {
    if constexpr (R % 4 == 0) {
#pragma unroll
        for (int i = 0; i < R; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < R; ++i) to[i] = v[i];
    }
}

// All rows of one projection that belong to this block. U units of columns a warp.
template <int U>
__device__ __forceinline__ void gemv(const Linear& linear, int op, const GemvInput& in, int num_rows,
                                     int exchange_chunks, int warp, int lane, RingReader& ring, uint32_t& batch_count,
                                     SharedState& shared) {
    constexpr int kRows = rows_per_warp(U), kChunks = kBatchRows / kRows;
    const int slice = warp % linear.k_slices, group = warp / linear.k_slices;
    const int num_chunks = ((num_rows - 1) >> (linear.row_bits + linear.group_bits)) + 1;
    const uint32_t row_bytes = pinned(linear.k * 2);
    const uint32_t lane_offset = group * kRows * row_bytes + slice * U * (kUnit * 2) + lane * 16;

    PROFILE_BEGIN(op_began);
    // Two chunks in turn: while one is multiplied, the other is on its way from shared memory.
    const bool signals = warp == 0 && lane == 0;
    const int exchange_from = max(num_chunks - exchange_chunks, 0);
    uint4 even[kRows][U], odd[kRows][U] = {};
    const auto load_chunk = [&](uint4(&w)[kRows][U]) {
        PROFILE_BEGIN(wait_began);
        const uint32_t chunk = ring.acquire() + lane_offset;
        PROFILE_END(shared, 5 + op, wait_began);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int u = 0; u < U; ++u) w[r][u] = load_shared(chunk + r * row_bytes + u * (kUnit * 2));
    };
    load_chunk(even);  // while x is on its way; registers then are one more slot of the ring
    ring.release(lane);
    PROFILE_BEGIN(input_began);
    float sum_squares;
    SplitInput<U> x;
    {
        float wide[U][8];
        sum_squares = load_input<U>(in, slice, lane, wide);
        x.set(wide);
    }
    PROFILE_END(shared, op, input_began);
    if (signals) *static_cast<volatile uint32_t*>(&shared.ring.exchanging) = 0;
    if (in.normed) {
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) sum_squares += __shfl_xor_sync(0xffffffffu, sum_squares, mask);
    }
    const auto multiply_chunk = [&](int c, const uint4(&w)[kRows][U], uint4(&next)[kRows][U]) {
        const uint32_t buffer = batch_count % kBatchBuffers, round = batch_count / kBatchBuffers;
        Batch& batch = shared.batch[buffer];
        if (c % kChunks == 0) wait_phase(common::shared_address(&shared.batch_empty[buffer]), (round & 1) ^ 1);
        if (c > 0) ring.release(lane);
        if (signals && c == exchange_from) *static_cast<volatile uint32_t*>(&shared.ring.exchanging) = 1;
        if (c + 1 < num_chunks) load_chunk(next);
        float sums[kRows];
        multiply_rows<U, kRows>(w, x, lane, sums);
        if (is_diagonal(lane)) store_floats<kRows>(&batch.part[warp * 8 + lane / 4][c % kChunks * kRows], sums);
        if (c % kChunks == kChunks - 1 || c + 1 == num_chunks) {
            if (lane == 1) batch.sum_squares[warp] = sum_squares;
            __syncwarp();
            if (lane == 0) common::mbarrier_arrive(common::shared_address(&shared.batch_full[buffer]));
            ++batch_count;
        }
    };
#pragma unroll 1
    for (int c = 0; c < num_chunks; c += 2) {
        multiply_chunk(c, even, odd);
        if (c + 1 < num_chunks) multiply_chunk(c + 1, odd, even);
    }
    PROFILE_END(shared, 10 + op, op_began);
}

}  // namespace decode_step
