// The query warp: it walks the block's range piece by piece, ahead of the computing warps, and hands them for each
// piece what is to be done and the query's fragments. In the fused kernel it rotates them on the way, and appends the
// new token to the cache where a unit is finished: its score and its value are the state that the unit starts from.
#pragma once
#include "decode_attn/merge.cuh"
#include "decode_attn/schedule.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

// One head's vector as 16-column fragments: columns 16 i + c and 16 i + 8 + c, c = 2 * (lane % 4). `head` null: zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_vector(uint32_t (&b)[kHeadDim / 16][2], const T* head, int lane) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            b[i][half] =
                head ? __ldg(reinterpret_cast<const uint32_t*>(head + 16 * i + 8 * half + 2 * (lane & 3))) : 0u;
        }
    }
}

// RoPE, half-split layout: column d turns with column d + head_dim / 2, which the same thread holds. fp32, then rounded
// once.
template <typename T, int kHeadDim>
__device__ __forceinline__ void rotate(uint32_t (&b)[kHeadDim / 16][2], const float* cos, const float* sin, int lane) {
    constexpr int kHalf = kHeadDim / 32;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = 16 * i + 8 * half + 2 * (lane & 3);
            const float2 c = __ldg(reinterpret_cast<const float2*>(cos + column));
            const float2 s = __ldg(reinterpret_cast<const float2*>(sin + column));
            const float2 x = common::Pack<T>::to_floats(b[i][half]), y = common::Pack<T>::to_floats(b[i + kHalf][half]);
            b[i][half] = common::Pack<T>::from_floats(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y);
            b[i + kHalf][half] = common::Pack<T>::from_floats(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y);
        }
    }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void load_query(QueryFragments<kHeadDim>& q, const Params& p, int row, int kv_head,
                                           int lane) {
    const int head = lane / 4;  // within the group
    const T* source = static_cast<const T*>(p.q) + row * p.stride_q_row + (kv_head * p.group + head) * p.stride_q_head;
    load_vector<T, kHeadDim>(q.b, head < p.group ? source : nullptr, lane);
}

// Appends the new token of (row, kv_head) to the cache, and returns its scaled scores for the heads 2 * (lane % 4) and
// the next. `k` is its rotated key, `v` its value, 64 columns a word.
template <typename T, int kHeadDim>
__device__ __forceinline__ float2 append(const Params& p, const Rows& rows, int row, int kv_head, int position,
                                         const QueryFragments<kHeadDim>& q, const uint32_t (&k)[kHeadDim / 16][2],
                                         const uint32_t (&v)[kHeadDim / 64], int lane) {
    const int index = position / kBlockSize, r = lane / 4, c = 2 * (lane & 3);
    const int64_t token = position % kBlockSize;
    const int block = p.block_table ? __ldg(p.block_table + row * p.stride_table_row + index)
                                    : rows.slots[row] * p.blocks_per_slot + index;
    T* k_target = static_cast<T*>(const_cast<void*>(p.k_cache)) + block * p.stride_k_block + kv_head * p.stride_k_head +
                  token * p.stride_k_token;
    T* v_target = static_cast<T*>(const_cast<void*>(p.v_cache)) + block * p.stride_v_block + kv_head * p.stride_v_head +
                  token * p.stride_v_token;
    float s[4] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        const uint32_t a[4] = {k[i][0], k[i][0], k[i][1], k[i][1]};  // every group of four lanes holds the whole key
        common::mma<T>(s, a, q.b[i][0], q.b[i][1]);
        if (r == i % 8) {
            *reinterpret_cast<uint32_t*>(k_target + 16 * i + c) = k[i][0];
            *reinterpret_cast<uint32_t*>(k_target + 16 * i + 8 + c) = k[i][1];
        }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 64; ++i) reinterpret_cast<uint32_t*>(v_target)[32 * i + lane] = v[i];
    return {s[0] * p.scale_log2, s[1] * p.scale_log2};
}

// Where the query warp is in the slots, and what it needs to fill the next one.
template <typename T, int kHeadDim, bool kFused>
struct QueryWarp {
    const Params& p;
    const Rows& rows;
    QuerySlot<kHeadDim>* slots;
    uint32_t full, empty;  // barriers of the slots
    Share share;
    int range, lane;
    RingCursor cursor{0, 1};  // the first round does not wait

    // All lanes: waits for the slot, lets `fill` write it, hands it over.
    template <typename Fill>
    __device__ __forceinline__ void hand_over(Fill fill) {
        common::mbarrier_wait(empty + cursor.stage * 8, cursor.phase);
        fill(slots[cursor.stage]);
        common::mbarrier_arrive(full + cursor.stage * 8);
        cursor.advance(1, kQuerySlots);
    }

    // `last_tile`: of a unit whose first tile is in the piece, in the list of all tiles; -1: none.
    __device__ __forceinline__ void prepare(Piece piece, int last_tile) {
        const int row = piece.row, head = piece.head;
        QueryFragments<kHeadDim> q;
        load_query<T, kHeadDim>(q, p, row, head, lane);
        float2 new_score = {0.0f, 0.0f};
        uint32_t v[kHeadDim / 64];
        if constexpr (kFused) {
            const int position = rows.tokens[row];
            const float *cos = p.cos + int64_t(position) * (kHeadDim / 2),
                        *sin = p.sin + int64_t(position) * (kHeadDim / 2);
            const T* k_new =
                static_cast<const T*>(p.q) + row * p.stride_q_row + (p.num_kv_heads * p.group + head) * kHeadDim;
            uint32_t k[kHeadDim / 16][2];
            load_vector<T, kHeadDim>(k, k_new, lane);
#pragma unroll
            for (int i = 0; i < kHeadDim / 64; ++i)
                v[i] = __ldg(reinterpret_cast<const uint32_t*>(k_new + p.num_kv_heads * kHeadDim) + 32 * i + lane);
            rotate<T, kHeadDim>(q.b, cos, sin, lane);
            if (piece.others >= 0) {
                rotate<T, kHeadDim>(k, cos, sin, lane);
                new_score = append<T, kHeadDim>(p, rows, row, head, position, q, k, v, lane);
            }
        }
        if (last_tile >= 0) piece.others = share.split.range_of(last_tile) - range;
        hand_over([&](QuerySlot<kHeadDim>& slot) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) slot.fragments[i][lane] = {q.b[i][0], q.b[i][1]};
            if constexpr (kFused) {
                if (lane < 4) *reinterpret_cast<float2*>(&slot.new_score[2 * lane]) = new_score;
#pragma unroll
                for (int i = 0; i < kHeadDim / 64; ++i)
                    reinterpret_cast<uint32_t*>(slot.new_value)[32 * i + lane] = v[i];
            }
            slot.piece = piece;
        });
    }

    // All pieces of the range, then what this block does for rows that have no tile and so belong to no range: row
    // `range`, range + grid, ...
    __device__ __forceinline__ void run() {
        const int end = share.begin + share.tiles;
        int tile = share.begin, empty_row = range, empty_head = 0;
        Walk walk = share.walk;
#pragma unroll 1
        while (true) {
            Piece next;
            int last_tile = -1;
            if (tile < end) {
                const bool finishes = walk.index == 0;
                next = {walk.row, walk.head, min(walk.count - walk.index, end - tile),
                        rows.tokens[walk.row] - walk.index * kBlockSize, finishes ? 0 : -1};
                if (finishes) last_tile = tile + walk.count - 1;
                tile += next.tiles;
                if (tile < end) walk.next_unit(rows);
            } else {
                for (; empty_row < p.batch && (!kFused || rows.tokens[empty_row] != 0); empty_row += gridDim.x)
                    if (rows.tokens[empty_row] <= 0) write_zeros<T, kHeadDim>(p, empty_row, lane);
                if (empty_row >= p.batch) break;
                next = {empty_row, empty_head, 0, 0, 0};
                if (++empty_head == p.num_kv_heads) empty_row += gridDim.x, empty_head = 0;
            }
            prepare(next, last_tile);
        }
        hand_over([&](QuerySlot<kHeadDim>& slot) { slot.piece.tiles = -1; });
    }
};

}  // namespace decode_attn
