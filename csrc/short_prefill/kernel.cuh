// Causal attention of short prompts, all the way from the packed projection: q and k are rotated, k and v stored in
// the cache, and every byte is read and written once.
//
// Grid: a block for each prompt and kv head, or several that share out its query heads where the GPU would not be full
// otherwise. A block keeps the prompt's rotated keys, and its values, in shared memory. Then its warps go their own
// ways: a warp takes 16 queries of one head at a time, and goes through their keys by 16.
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
constexpr int kTile = 16;  // queries of a tile, and keys of a step
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int shared_bytes(int tokens, int head_dim) {
    return 2 * ((tokens + kTile - 1) / kTile * kTile) * head_dim * 2;
}

// Rows of kHeadDim elements in shared memory, aligned to a row. Neighbouring rows have their chunks in other banks: the
// one that is 2 n chunks further in a row lies at an address ^ 32 n.
template <int kHeadDim>
struct Rows {
    static constexpr int kBytes = kHeadDim * 2;
    uint32_t base;
    __device__ __forceinline__ uint32_t at(int row, int chunk) const {
        return base + row * kBytes + (chunk ^ (row % 8)) * 16;
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
    constexpr int kChunks = 2 * kPairs, kApart = kThreads / kPairs, kAtOnce = 2;  // rows of a thread
    const int pair = threadIdx.x % kPairs, heads = p.num_heads + 2 * p.num_kv_heads;
    const uint4* k = static_cast<const uint4*>(p.qkv) +
                     (int64_t(place.first) * heads + p.num_heads + place.kv_head) * kChunks + pair;
    const uint4* v = k + p.num_kv_heads * kChunks;
    const int64_t slot = p.slots[place.tokens ? place.first : 0];
    const int rows = (place.tokens + kTile - 1) / kTile * kTile;
#pragma unroll 1
    for (int row = threadIdx.x / kPairs; row < rows; row += kAtOnce * kApart) {
        uint4 k_pair[kAtOnce][2], v_pair[kAtOnce][2];
        bool stored[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int token = min(row + i * kApart, place.tokens - 1), from = token * heads * kChunks;
            k_pair[i][0] = k[from], k_pair[i][1] = k[from + kPairs];
            v_pair[i][0] = v[from], v_pair[i][1] = v[from + kPairs];
            stored[i] = place.stores && row + i * kApart < place.tokens && p.positions[place.first + token] >= 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int token = row + i * kApart;
            if (token >= rows) break;
            common::rotate<T>(k_pair[i][0], k_pair[i][1], {p.cos, p.sin, angles_at<kHeadDim>(p, token, pair)});
            if (stored[i]) {
                const int64_t block = slot * p.blocks_per_slot + token / kBlockSize;
                const int64_t to =
                    ((block * p.num_kv_heads + place.kv_head) * kBlockSize + token % kBlockSize) * kChunks + pair;
                uint4 *k_cache = static_cast<uint4*>(p.k_cache) + to, *v_cache = static_cast<uint4*>(p.v_cache) + to;
                k_cache[0] = k_pair[i][0], k_cache[kPairs] = k_pair[i][1];
                v_cache[0] = v_pair[i][0], v_cache[kPairs] = v_pair[i][1];
            }
            // What stands behind the last token is its copy, so that weights of 0 meet no NaN which is not its own.
            keys.store(token, pair, k_pair[i][0]), keys.store(token, pair + kPairs, k_pair[i][1]);
            values.store(token, pair, v_pair[i][0]), values.store(token, pair + kPairs, v_pair[i][1]);
        }
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
    int heads, tile, head;
    __device__ __forceinline__ Tiles(const Place& place)
        : heads(place.heads), tile((place.tokens + kTile - 1) / kTile - 1), head(place.heads - 1) {
        skip(threadIdx.x / 32);
    }
    __device__ __forceinline__ bool done() const { return tile < 0; }
    __device__ __forceinline__ void skip(int count) {
        for (head -= count; head < 0; head += heads) --tile;
    }
};

template <int kHeadDim>
__device__ __forceinline__ void ask_for_queries(Queries<kHeadDim>& q, const Params& p, const Place& place,
                                                const Tiles& at) {
    const int lane = threadIdx.x % 32, heads = p.num_heads + 2 * p.num_kv_heads;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = min(at.tile * kTile + lane / 4 + 8 * h, place.tokens - 1);
        const uint4* from = static_cast<const uint4*>(p.qkv) +
                            (int64_t(place.first + row) * heads + place.head + at.head) * (kHeadDim / 8) + lane % 4;
#pragma unroll
        for (int m = 0; m < Queries<kHeadDim>::kPieces; ++m) q.q[m][h] = from[4 * m];
    }
}

// As fragments, of 16 columns each, of what multiplies keys.
template <typename T, int kHeadDim>
__device__ __forceinline__ void rotate_queries(uint32_t (&fragments)[kHeadDim / 16][4], Queries<kHeadDim>& q,
                                               const Params& p, const Place& place, int tile) {
    constexpr int kPieces = Queries<kHeadDim>::kPieces, kHalf = kPieces / 2;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = min(tile * kTile + lane / 4 + 8 * h, place.tokens - 1);
        const int table = angles_at<kHeadDim>(p, row, lane % 4);
#pragma unroll
        for (int m = 0; m < kHalf; ++m) common::rotate<T>(q.q[m][h], q.q[m + kHalf][h], {p.cos, p.sin, table + 32 * m});
#pragma unroll
        for (int m = 0; m < kPieces; ++m) {
            fragments[2 * m][h] = q.q[m][h].x, fragments[2 * m][2 + h] = q.q[m][h].y;
            fragments[2 * m + 1][h] = q.q[m][h].z, fragments[2 * m + 1][2 + h] = q.q[m][h].w;
        }
    }
}

// Of a lane's rows r and r + 8: what their weights are relative to, in powers of two, and the weights' sums.
struct Softmax {
    float most[2] = {-INFINITY, -INFINITY}, sums[2] = {};
};

// Scores of 16 queries and the step's keys, 8 keys in each s[i].
template <typename T, int kHeadDim>
__device__ __forceinline__ void score(float (&s)[2][4], const uint32_t (&queries)[kHeadDim / 16][4],
                                      const Rows<kHeadDim>& keys, int step) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = keys.at(step * kTile + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
        uint32_t b[4];  // of 8 keys two chunks, of the other 8 the same
        common::ldmatrix_x4(b, first ^ (32 * k));
        common::mma<T>(s[0], queries[k], b[0], b[1]);
        common::mma<T>(s[1], queries[k], b[2], b[3]);
    }
}

// Scores to weights, as the fragment of what multiplies values. What was gathered before has to be multiplied by
// `factors`.
template <typename T>
__device__ __forceinline__ void soften(uint32_t (&weights)[4], float (&factors)[2], Softmax& softmax,
                                       const float (&s)[2][4], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float most = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2)) * scale_log2;
        most = fmaxf(most, softmax.most[h]);
        factors[h] = common::exp2_fast(softmax.most[h] - most);
        softmax.most[h] = most, softmax.sums[h] *= factors[h];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float a = common::exp2_fast(fmaf(s[i][2 * h], scale_log2, -most));
            const float b = common::exp2_fast(fmaf(s[i][2 * h + 1], scale_log2, -most));
            softmax.sums[h] += a + b;
            weights[2 * i + h] = common::Pack<T>::from_floats(a, b);
        }
    }
}

// Adds the step's values by weight.
template <typename T, int kHeadDim>
__device__ __forceinline__ void weigh(float (&o)[kHeadDim / 8][4], const uint32_t (&weights)[4],
                                      const Rows<kHeadDim>& values, int step) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = values.at(step * kTile + lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 2) {
        uint32_t b[4];  // of a chunk 8 values and the other 8, of the next chunk the same
        common::ldmatrix_x4_trans(b, first ^ (16 * j));
        common::mma<T>(o[j], weights, b[0], b[1]);
        common::mma<T>(o[j + 1], weights, b[2], b[3]);
    }
}

// One tile of queries, rotated, over all keys that they see: the output, and 1 / the weights' sums.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend(float (&o)[kHeadDim / 8][4], float (&shares)[2],
                                       const uint32_t (&queries)[kHeadDim / 16][4], const Rows<kHeadDim>& keys,
                                       const Rows<kHeadDim>& values, int tile) {
    const int lane = threadIdx.x % 32;
    constexpr float scale_log2 = kLog2E * (kHeadDim == 64 ? 0.125f : 0.0883883476f);  // 1 / sqrt(kHeadDim)
    Softmax softmax;
#pragma unroll 1
    for (int step = 0; step <= tile; ++step) {
        float s[2][4] = {}, factors[2];
        score<T>(s, queries, keys, step);
        if (step == tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i / 4 * 8 + lane % 4 * 2 + i % 2 > lane / 4 + i / 2 % 2 * 8) s[i / 4][i % 4] = -INFINITY;
        }
        uint32_t weights[4];
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
        const int row = at.tile * kTile + lane / 4 + 8 * h;
        if (row >= place.tokens) continue;
        uint4* to = static_cast<uint4*>(p.out) +
                    (int64_t(place.first + row) * p.num_heads + place.head + at.head) * (kHeadDim / 8) + lane % 4;
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
    extern __shared__ __align__(256) uint4 shared_memory[];
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    const Place place = place_of(p);
    const Rows<kHeadDim> keys{common::shared_address(shared_memory)};
    const Rows<kHeadDim> values{keys.base + shared_bytes(p.max_tokens, kHeadDim) / 2};
    Tiles at(place);
    Queries<kHeadDim> q;
    bring_keys<T>(p, place, keys, values);
    if (!at.done()) ask_for_queries(q, p, place, at);
    __syncthreads();
    while (!at.done()) {
        const Tiles now = at;
        uint32_t queries[kHeadDim / 16][4];
        rotate_queries<T>(queries, q, p, place, now.tile);
        float o[kHeadDim / 8][4] = {}, shares[2];
        attend<T>(o, shares, queries, keys, values, now.tile);
        at.skip(kWarps);
        Queries<kHeadDim>
            next;  // not q: the compiler would keep that beside its fragments, and move them at every step
        if (!at.done()) ask_for_queries(next, p, place, at);
        store<T, kHeadDim>(p, place, now, o, shares);
        q = next;
    }
}

}  // namespace short_prefill
