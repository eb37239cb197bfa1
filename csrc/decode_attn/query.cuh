// The query warp: it walks the block's range piece by piece, ahead of the computing warps, and hands them for each
// piece what is to be done and the query's fragments. In the fused kernel it rotates them on the way, and appends the
// new token to the cache where a unit is finished: its score and its value are the state that the unit starts from. At
// the end it prepares the block's range for the next launch (merge.cuh).
//
// Inputs of several pieces are on their way at a time, by cp.async into the slots of the pieces. A trip to memory waits
// behind all that the loading warp has asked for: one piece after the other, short contexts would wait for queries, not
// for tiles.
#pragma once
#include "decode_attn/merge.cuh"
#include "decode_attn/schedule.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {

// 16-column fragments of a vector that lies in shared memory: columns 16 i + c and 16 i + 8 + c, c = 2 * (lane % 4).
template <int kHeadDim>
__device__ __forceinline__ void read_vector(uint32_t (&b)[kHeadDim / 16][2], const uint16_t* vector, int lane) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            b[i][half] = *reinterpret_cast<const uint32_t*>(vector + 16 * i + 8 * half + 2 * (lane & 3));
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
            const float2 c = *reinterpret_cast<const float2*>(cos + column);
            const float2 s = *reinterpret_cast<const float2*>(sin + column);
            const float2 x = common::Pack<T>::to_floats(b[i][half]), y = common::Pack<T>::to_floats(b[i + kHalf][half]);
            b[i][half] = common::Pack<T>::from_floats(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y);
            b[i + kHalf][half] = common::Pack<T>::from_floats(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y);
        }
    }
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

// The pieces of the block's range in order, then those of rows that have no tile and so belong to no range: row
// `range`, range + grid, ... In the fused kernel such a row attends to its new token, one piece a kv head; a row that
// attends to nothing gets zeros at once.
template <typename T, int kHeadDim, bool kFused>
struct Pieces {
    const Params& p;
    const Rows& rows;
    const Share& share;
    int range, lane;
    Walk walk;
    int tile, end, unit_end = 0, empty_row, empty_head = 0;

    __device__ Pieces(const Params& p, const Rows& rows, const Share& share, int range, int lane)
        : p(p),
          rows(rows),
          share(share),
          range(range),
          lane(lane),
          walk(share.walk),
          tile(share.begin),
          end(share.begin + share.tiles),
          empty_row(range) {}

    // All but the number of others, for which there is time when its query has been asked for, and the buffer.
    __device__ __forceinline__ bool next(Piece& piece) {
        if (tile < end) {
            if (tile > share.begin) walk.next_unit(rows);
            piece = {walk.row, walk.head, min(walk.count - walk.index, end - tile),
                     walk.tokens - walk.index * kBlockSize, -1};
            unit_end = walk.index == 0 ? tile + walk.count : 0;
            tile += piece.tiles;
            return true;
        }
        for (; empty_row < p.batch && (!kFused || rows.tokens[empty_row] != 0); empty_row += gridDim.x)
            if (rows.tokens[empty_row] <= 0) write_zeros<T, kHeadDim>(p, empty_row, lane);
        if (empty_row >= p.batch) return false;
        piece = {empty_row, empty_head, 0, 0, 0};
        if (++empty_head == p.num_kv_heads) empty_row += gridDim.x, empty_head = 0;
        unit_end = 0;
        return true;
    }

    // Whether the first piece is one of a unit that another block finishes.
    __device__ bool publishes() const { return share.tiles > 0 && share.walk.index > 0; }

    // Of the piece that next() has returned: Piece::others.
    __device__ __forceinline__ int others(const Piece& piece) const {
        return unit_end > 0 ? share.split.range_of(unit_end - 1) - range : piece.others;
    }
};

// Where the query warp is in the slots.
template <typename T, int kHeadDim, bool kFused>
struct QueryWarp {
    using Slot = QuerySlot<kHeadDim>;
    const Params& p;
    const Rows& rows;
    Slot* slots;
    uint32_t full, empty;  // barriers of the slots
    RangeState state;      // of the block's range
    int lane;
    RingCursor asked{0, 1}, made{0};  // the first round does not wait

    // Asks for 2 * kHeadDim bytes.
    __device__ __forceinline__ void ask_for(void* target, const void* source) const {
#pragma unroll
        for (int word = lane; word < kHeadDim / 2; word += 32)
            common::cp_async_4(common::shared_address(target) + 4 * word, static_cast<const uint32_t*>(source) + word);
    }

    // Waits for the next slot and asks for the inputs of the piece.
    __device__ __forceinline__ void ask(const Pieces<T, kHeadDim, kFused>& pieces, Piece piece) {
        common::mbarrier_wait(empty + asked.stage * 8, asked.phase);
        Slot& slot = slots[asked.stage];
        asked.advance(1, Slot::kCount);
        const T* row = static_cast<const T*>(p.q) + piece.row * p.stride_q_row;
        const T* q = row + piece.head * p.group * p.stride_q_head;
#pragma unroll 1
        for (int head = 0; head < p.group; ++head, q += p.stride_q_head) ask_for(slot.q + head * Slot::kRow, q);
        if constexpr (kFused) {
            const int64_t angles = int64_t(rows.tokens[piece.row]) * (kHeadDim / 2);
            const T* k = row + (p.num_kv_heads * p.group + piece.head) * kHeadDim;
            ask_for(slot.new_key, k);
            ask_for(slot.new_value, k + p.num_kv_heads * kHeadDim);
            ask_for(slot.cos, p.cos + angles);
            ask_for(slot.sin, p.sin + angles);
        }
        common::cp_async_commit();
        piece.others = pieces.others(piece);
        slot.piece = piece;
    }

    // Makes of the oldest inputs what the computing warps take, once they are there: `younger` others may not be.
    __device__ __forceinline__ void make(int younger) {
        static_assert(kQueriesAhead == 4);
        // Branches by hand: of a switch the compiler makes a table in constant memory, a trip to L2 for the first
        // piece.
        if (younger < 2) {
            if (younger < 1)
                common::cp_async_wait<0>();
            else
                common::cp_async_wait<1>();
        } else {
            if (younger < 3)
                common::cp_async_wait<2>();
            else
                common::cp_async_wait<3>();
        }
        __syncwarp();
        Slot& slot = slots[made.stage];
        QueryFragments<kHeadDim> q;
        read_vector<kHeadDim>(q.b, slot.q + lane / 4 * Slot::kRow, lane);
        const bool exists = lane / 4 < p.group;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
            for (uint32_t& word : q.b[i]) word = exists ? word : 0u;
        }
        if constexpr (kFused) {
            rotate<T, kHeadDim>(q.b, slot.cos, slot.sin, lane);
            const Piece piece = slot.piece;
            if (piece.others >= 0) {
                uint32_t k[kHeadDim / 16][2], v[kHeadDim / 64];
                read_vector<kHeadDim>(k, slot.new_key, lane);
                rotate<T, kHeadDim>(k, slot.cos, slot.sin, lane);
#pragma unroll
                for (int i = 0; i < kHeadDim / 64; ++i)
                    v[i] = reinterpret_cast<const uint32_t*>(slot.new_value)[32 * i + lane];
                const float2 score =
                    append<T, kHeadDim>(p, rows, piece.row, piece.head, rows.tokens[piece.row], q, k, v, lane);
                if (lane < 4) *reinterpret_cast<float2*>(&slot.new_score[2 * lane]) = score;
            }
        }
        slot.piece.buffer = state.buffer();
        __syncwarp();  // the fragments take the place of q
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) slot.fragments[i][lane] = {q.b[i][0], q.b[i][1]};
        hand_over();
    }

    // All lanes.
    __device__ __forceinline__ void hand_over() {
        common::mbarrier_arrive(full + made.stage * 8);
        made.advance(1, Slot::kCount);
    }

    __device__ __forceinline__ void run(Pieces<T, kHeadDim, kFused> pieces) {
        int on_their_way = 0;
        Piece piece;
#pragma unroll 1
        for (bool more = true;;) {
            if (more && on_their_way < kQueriesAhead) {
                more = pieces.next(piece);
                if (!more) continue;
                ask(pieces, piece);
                ++on_their_way;
            } else if (on_their_way > 0) {
                make(--on_their_way);
            } else {
                break;
            }
        }
        common::mbarrier_wait(empty + asked.stage * 8, asked.phase);
        slots[asked.stage].piece.tiles = -1;
        hand_over();
        prepare_next(p, pieces.range, state, pieces.publishes() ? kHeadDim / 16 * 16 + (p.group + 1) / 2 : 0, lane);
        if (pieces.range + 1 < gridDim.x) return;
#pragma unroll 1
        for (int range = gridDim.x; range < p.ranges; ++range)  // those that this launch has no blocks for
            prepare_next(p, range, *RangeState::of(p, range), 0, lane);
    }
};

}  // namespace decode_attn
