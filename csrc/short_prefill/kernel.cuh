// Causal attention of short prompts, all the way from the packed projection: q and k are rotated, k and v stored in
// the cache, and every byte is read and written once.
//
// Grid: a block for each prompt and kv head, or several that share out its query heads where the GPU would not be full
// otherwise. A block keeps the prompt's rotated keys, and its values, in shared memory. Then its warps go their own
// ways: a warp takes 16 queries of one head at a time, and goes through their keys by 32.
//
// A row's 16-byte chunks lie in an order that suits the tensor cores: what a lane gets of a row as fragments, two
// elements of every chunk of 8, are 8 neighbours in memory. So queries go from memory to fragments and outputs from
// fragments to memory in pieces of 16 bytes, and an element and the one that it turns with are in the same lane.
// Element 32 m + 8 c + 2 q + e of a row is element 2 c + e of its chunk 4 m + q.
#pragma once
#include "common/async.cuh"
#include "common/chunk.cuh"
#include "common/exp2.cuh"
#include "common/mma.cuh"
#include "short_prefill/launch.h"

namespace short_prefill {

using common::kBlockSize;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTile = 16;  // queries of a tile
constexpr int kStep = 32;  // keys of a step
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int shared_bytes(int tokens, int head_dim) {
    return 2 * ((tokens + kStep - 1) / kStep * kStep) * head_dim * 2;
}

// Rows of kHeadDim elements in shared memory. Neighbouring rows have their chunks in other banks.
template <int kHeadDim>
struct Rows {
    uint32_t base;
    __device__ __forceinline__ uint32_t at(int row, int chunk) const {
        return base + row * (kHeadDim * 2) + (chunk ^ (row % 8)) * 16;
    }
    // Elements 8 i .. 8 i + 7 of a row.
    __device__ __forceinline__ void store(int row, int i, const uint4& v) const {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int q = 0; q < 4; ++q)
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at(row, i / 4 * 4 + q) + i % 4 * 4), "r"(words[q]) : "memory");
    }
};

// Where the block's prompt and heads lie.
struct Place {
    int first, tokens;         // of the prompt
    int kv_head, head, heads;  // the first query head, and how many
    bool stores;               // the keys and values
};

__device__ __forceinline__ Place place_of(const Params& p) {
    const int group = p.group(), shares = p.shares();
    const int seq = blockIdx.x / (p.num_kv_heads * shares), rest = blockIdx.x % (p.num_kv_heads * shares);
    const int kv_head = rest / shares, share = rest % shares, from = share * p.block_heads;
    const int first = p.starts[seq];
    return {first,     p.starts[seq + 1] - first, kv_head, kv_head * group + from, min(p.block_heads, group - from),
            share == 0};
}

// Where in the tables the angles of a token's chunk are. Padding may reach beyond the last position that there is.
template <int kHeadDim>
__device__ __forceinline__ int angles_at(const Params& p, int token, int chunk) {
    return min(token, p.num_positions - 1) * (kHeadDim / 2) + chunk * common::kChunk;
}

// The prompt's keys and values: from the projection to shared memory, and to the cache.
template <typename T, int kHeadDim>
__device__ __forceinline__ void bring_keys(const Params& p, const Place& place, const Rows<kHeadDim>& keys,
                                           const Rows<kHeadDim>& values) {
    constexpr int kPairs = kHeadDim / 16;  // of chunks that turn together, `pair` and `pair + kPairs`
    constexpr int kChunks = 2 * kPairs, kAtOnce = 2;
    const int pair = threadIdx.x % kPairs, heads = p.num_heads + 2 * p.num_kv_heads;
    const uint4* k = static_cast<const uint4*>(p.qkv) +
                     (int64_t(place.first) * heads + p.num_heads + place.kv_head) * kChunks + pair;
    const uint4* v = k + p.num_kv_heads * kChunks;
    const int64_t slot = p.slots[place.tokens ? place.first : 0];
    const int rows = (place.tokens + kStep - 1) / kStep * kStep;
#pragma unroll kAtOnce
    for (int row = threadIdx.x / kPairs; row < rows; row += kThreads / kPairs) {
        uint4 k_low{}, k_high{}, v_low{}, v_high{};  // weights behind the last token are 0, and 0 x NaN would be NaN
        if (row < place.tokens) {
            const int64_t from = int64_t(row) * heads * kChunks;
            k_low = k[from], k_high = k[from + kPairs], v_low = v[from], v_high = v[from + kPairs];
            const bool stored = place.stores && p.positions[place.first + row] >= 0;
            common::rotate<T>(k_low, k_high, {p.cos, p.sin, angles_at<kHeadDim>(p, row, pair)});
            if (stored) {
                const int64_t block = slot * p.blocks_per_slot + row / kBlockSize;
                const int64_t to =
                    ((block * p.num_kv_heads + place.kv_head) * kBlockSize + row % kBlockSize) * kChunks + pair;
                uint4 *k_cache = static_cast<uint4*>(p.k_cache) + to, *v_cache = static_cast<uint4*>(p.v_cache) + to;
                k_cache[0] = k_low, k_cache[kPairs] = k_high, v_cache[0] = v_low, v_cache[kPairs] = v_high;
            }
        }
        keys.store(row, pair, k_low), keys.store(row, pair + kPairs, k_high);
        values.store(row, pair, v_low), values.store(row, pair + kPairs, v_high);
    }
}

// A lane's share of 16 queries of a head: 16-byte pieces m of rows r and r + 8, elements 32 m + 8 c on.
template <int kHeadDim>
struct Queries {
    static constexpr int kPieces = kHeadDim / 32;
    uint4 q[kPieces][2];
};

// A warp's way through the block's tiles: those with the most keys first, the heads of a tile side by side.
struct Tiles {
    int heads, count, index;
    __device__ __forceinline__ Tiles(const Place& place)
        : heads(place.heads), count((place.tokens + kTile - 1) / kTile * place.heads), index(threadIdx.x / 32) {}
    __device__ __forceinline__ bool done() const { return index >= count; }
    __device__ __forceinline__ int tile() const { return (count - 1 - index) / heads; }
    __device__ __forceinline__ int head() const { return (count - 1 - index) % heads; }
};

template <int kHeadDim>
__device__ __forceinline__ void ask_for_queries(Queries<kHeadDim>& q, const Params& p, const Place& place,
                                                const Tiles& at) {
    const int lane = threadIdx.x % 32, heads = p.num_heads + 2 * p.num_kv_heads;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = min(at.tile() * kTile + lane / 4 + 8 * h, place.tokens - 1);
        const uint4* from = static_cast<const uint4*>(p.qkv) +
                            (int64_t(place.first + row) * heads + place.head + at.head()) * (kHeadDim / 8) + lane % 4;
#pragma unroll
        for (int m = 0; m < Queries<kHeadDim>::kPieces; ++m) q.q[m][h] = from[4 * m];
    }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void rotate_queries(Queries<kHeadDim>& q, const Params& p, const Place& place, int tile) {
    constexpr int kHalf = Queries<kHeadDim>::kPieces / 2;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = min(tile * kTile + lane / 4 + 8 * h, place.tokens - 1);
        const int table = angles_at<kHeadDim>(p, row, lane % 4);
#pragma unroll
        for (int m = 0; m < kHalf; ++m) common::rotate<T>(q.q[m][h], q.q[m + kHalf][h], {p.cos, p.sin, table + 32 * m});
    }
}

// Of a lane's rows r and r + 8: what their weights are relative to, in powers of two, and the weights' sums.
struct Softmax {
    float most[2] = {-INFINITY, -INFINITY}, sums[2] = {};
};

// Scores of 16 queries and the step's keys, 8 keys in each s[i].
template <typename T, int kHeadDim>
__device__ __forceinline__ void score(float (&s)[kStep / 8][4], const Queries<kHeadDim>& q, const Rows<kHeadDim>& keys,
                                      int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
        const uint4 &r = q.q[k / 2][0], &r8 = q.q[k / 2][1];
        const uint32_t even[4] = {r.x, r8.x, r.y, r8.y}, odd[4] = {r.z, r8.z, r.w, r8.w};
#pragma unroll
        for (int i = 0; i < kStep / 8; i += 2) {
            uint32_t b[4];  // of 8 keys two chunks, of the next 8 the same
            const int row = step * kStep + 8 * i + lane / 16 * 8 + lane % 8;
            common::ldmatrix_x4(b, keys.at(row, 2 * k + lane / 8 % 2));
            common::mma<T>(s[i], k % 2 ? odd : even, b[0], b[1]);
            common::mma<T>(s[i + 1], k % 2 ? odd : even, b[2], b[3]);
        }
    }
}

// Scores to weights, as the fragments of what multiplies values. What was gathered before has to be multiplied by
// `factors`.
template <typename T>
__device__ __forceinline__ void soften(uint32_t (&weights)[kStep / 16][4], float (&factors)[2], Softmax& softmax,
                                       const float (&s)[kStep / 8][4], float scale_log2) {
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i / 4][i % 4]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 1));
        most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], 2)) * scale_log2;
        most[h] = fmaxf(most[h], softmax.most[h]);
        factors[h] = common::exp2_fast(softmax.most[h] - most[h]);
        softmax.most[h] = most[h], softmax.sums[h] *= factors[h];
    }
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // rows r and r + 8 of the first 8 keys, then of the next
            const float* x = s[2 * i + j / 2] + j % 2 * 2;
            const float a = common::exp2_fast(fmaf(x[0], scale_log2, -most[j % 2]));
            const float b = common::exp2_fast(fmaf(x[1], scale_log2, -most[j % 2]));
            softmax.sums[j % 2] += a + b;
            weights[i][j] = common::Pack<T>::from_floats(a, b);
        }
    }
}

// Adds the step's values by weight.
template <typename T, int kHeadDim>
__device__ __forceinline__ void weigh(float (&o)[kHeadDim / 8][4], const uint32_t (&weights)[kStep / 16][4],
                                      const Rows<kHeadDim>& values, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; j += 2) {
            uint32_t b[4];  // of a chunk 8 values and 8 more, of the next chunk the same
            const int row = step * kStep + 16 * i + lane / 8 % 2 * 8 + lane % 8;
            common::ldmatrix_x4_trans(b, values.at(row, j + lane / 16));
            common::mma<T>(o[j], weights[i], b[0], b[1]);
            common::mma<T>(o[j + 1], weights[i], b[2], b[3]);
        }
    }
}

// One tile of queries, rotated, over all keys that they see: the output, and 1 / the weights' sums.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(float (&o)[kHeadDim / 8][4], float (&shares)[2], const Queries<kHeadDim>& q,
                                       const Rows<kHeadDim>& keys, const Rows<kHeadDim>& values, int tile) {
    const int lane = threadIdx.x % 32, last = tile * kTile / kStep;
    const float scale_log2 = kLog2E * rsqrtf(float(kHeadDim));
    Softmax softmax;
#pragma unroll 1
    for (int step = 0; step <= last; ++step) {
        float s[kStep / 8][4] = {}, factors[2];
        score<T>(s, q, keys, step);
        if (step == last) {
#pragma unroll
            for (int i = 0; i < kStep / 2; ++i) {
                const int key = step * kStep + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (key > tile * kTile + lane / 4 + i / 2 % 2 * 8) s[i / 4][i % 4] = -INFINITY;
            }
        }
        uint32_t weights[kStep / 16][4];
        soften<T>(weights, factors, softmax, s, scale_log2);
        if (__any_sync(~0u, factors[0] + factors[1] < 2)) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) o[i / 4][i % 4] *= factors[i / 2 % 2];
        }
        weigh<T>(o, weights, values, step);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float sum = softmax.sums[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        shares[h] = __fdividef(1.0f, sum);
    }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void store(const Params& p, const Place& place, const Tiles& at,
                                      const float (&o)[kHeadDim / 8][4], const float (&factors)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = at.tile() * kTile + lane / 4 + 8 * h;
        if (row >= place.tokens) continue;
        uint4* to = static_cast<uint4*>(p.out) +
                    (int64_t(place.first + row) * p.num_heads + place.head + at.head()) * (kHeadDim / 8) + lane % 4;
#pragma unroll
        for (int m = 0; m < kHeadDim / 32; ++m) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = o[4 * m + i / 2][2 * h + i % 2] * factors[h];
            to[4 * m] = common::from_floats<T>(x);
        }
    }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) short_prefill_kernel(Params p) {
    extern __shared__ uint4 shared_memory[];
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    const Place place = place_of(p);
    const Rows<kHeadDim> keys{common::shared_address(shared_memory)};
    const Rows<kHeadDim> values{keys.base + shared_bytes(place.tokens, kHeadDim) / 2};
    Tiles at(place);
    Queries<kHeadDim> q;
    if (!at.done()) ask_for_queries(q, p, place, at);
    bring_keys<T>(p, place, keys, values);
    __syncthreads();
    while (!at.done()) {
        const Tiles now = at;
        rotate_queries<T>(q, p, place, now.tile());
        float o[kHeadDim / 8][4] = {}, shares[2];
        attend<T>(o, shares, q, keys, values, now.tile());
        at.index += kWarps;
        if (!at.done()) ask_for_queries(q, p, place, at);
        store<T, kHeadDim>(p, place, now, o, shares);
    }
}

}  // namespace short_prefill
