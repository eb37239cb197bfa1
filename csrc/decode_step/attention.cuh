// The math warps' part of rope, append and attention over the cached context: one kv head and its query heads a block,
// or one of several splits of its context.
//
// Each warp takes 8 tokens of every 64-token tile, and keys and values go to the tensor core as they lie in shared
// memory, 16 bytes a lane. The left operand has the query heads (later their weights) in rows 0-7, and in rows 8-15
// what bf16 leaves over of them, so that they count with 16 bits of mantissa; a lane adds the two rows' products.
// Lane 4 g + t holds head g.
#pragma once
#include "common/exp2.cuh"
#include "decode_step/gemv.cuh"

namespace decode_step {

// Partial results of the warps: out [kMathWarps][group][D + 16] in the order of `output_element`, then max and sum.
constexpr int kOutPadding = 16;  // floats: heads fall into different banks
__host__ __device__ constexpr int attention_scratch_bytes(int head_dim, int group) {
    return align_up(kMathWarps * group * ((head_dim + kOutPadding) * 4 + 8));
}

template <int D>
struct Attention {
    static constexpr int kPieces = D / 32;  // 16-byte pieces of a key that a lane holds: bytes 64 j + 16 t of token g
    static constexpr int kHalves = D / 64;  // of a value: bytes 128 h + 16 g of tokens 2 t and 2 t + 1
    static constexpr int kRowBytes = D * 2, kTileBytes = kTileTokens * kRowBytes;
    static constexpr float kNoScore = -1e30f;  // the maximum of nothing, finite so that differences are

    static constexpr int kFresh = D / 64;  // 16-byte vectors of the new key and value a lane
    static constexpr int kInSlot = kSlotBytes / (2 * kTileBytes), kRound = 2 * kInSlot;  // tiles taken at a time

    uint32_t q[2 * kPieces][4];
    uint4 fresh[kFresh];                  // words of the new key and value, in the warp that appends them
    float out[8 * kHalves][4] = {};       // columns 2 t and 2 t + 1 of product i: elements 16 t + i and 16 t + 8 + i
    float maximum = kNoScore, sum = 0.f;  // of head g; the sum of this lane's tokens only

    __device__ __forceinline__ static void split(float a, float b, uint32_t& high, uint32_t& low) {
        high = common::Pack<bf16>::from_floats(a, b);
        low = common::Pack<bf16>::from_floats(a - bf16_low(high), b - bf16_high(high));
    }

    // Waits for q, and if the warp appends the new token also for its key and value, and rotates q. Elements d and
    // d + D / 2 turn together: one lane has both.
    __device__ __forceinline__ void load_words(const Params& p, const Step& step, uint32_t use, int kv_head, int group,
                                               bool appends, int lane) {
        const int head = lane >> 2, column = (lane & 3) * 8;
        const uint32_t* words = p.qkv + (kv_head * group + min(head, group - 1)) * D + column;
        const uint32_t *new_k = p.qkv + (p.num_heads + kv_head) * D, *new_v = new_k + p.num_kv_heads * D;
        constexpr int kPairs = kPieces / 2;
        const int64_t angle = static_cast<int64_t>(step.position) * (D / 2) + column;
        float4 c[2 * kPairs], s[2 * kPairs];
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            c[i] = __ldg(reinterpret_cast<const float4*>(p.cos + angle + i / 2 * 32) + i % 2);
            s[i] = __ldg(reinterpret_cast<const float4*>(p.sin + angle + i / 2 * 32) + i % 2);
        }
        uint4 v[2 * kPieces + kFresh];
        await(
            v,
            [=](int i) {
                const uint32_t* from = words + i / 2 * 32 + i % 2 * 4;
                if (i >= 2 * kPieces) {
                    const int n = (i - 2 * kPieces) * 32 + lane;  // of [k, v]
                    from = !appends ? words : n < D / 4 ? new_k + n * 4 : new_v + (n - D / 4) * 4;
                }
                return reinterpret_cast<const uint4*>(from);
            },
            use);
#pragma unroll
        for (int i = 0; i < kFresh; ++i) fresh[i] = v[2 * kPieces + i];
        const float scale = head < group ? p.softmax_scale_log2 : 0.f;
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            const uint4 first = v[i], second = v[i + 2 * kPairs];
            const float a[4] = {untag(first.x), untag(first.y), untag(first.z), untag(first.w)};
            const float b[4] = {untag(second.x), untag(second.y), untag(second.z), untag(second.w)};
            const float cosine[4] = {c[i].x * scale, c[i].y * scale, c[i].z * scale, c[i].w * scale};
            const float sine[4] = {s[i].x * scale, s[i].y * scale, s[i].z * scale, s[i].w * scale};
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                split(a[e] * cosine[e] - b[e] * sine[e], a[e + 1] * cosine[e + 1] - b[e + 1] * sine[e + 1], q[i][e],
                      q[i][e + 1]);
                split(b[e] * cosine[e] + a[e] * sine[e], b[e + 1] * cosine[e + 1] + a[e + 1] * sine[e + 1],
                      q[i + 2 * kPairs][e], q[i + 2 * kPairs][e + 1]);
            }
        }
    }

    // Shared address of tile i of a round: its keys, and then its values. The round lies in two slots of the ring.
    __device__ __forceinline__ static uint32_t tile_of(const uint32_t (&slot)[2], int i) {
        return (i < kInSlot ? slot[0] : slot[1]) + i % kInSlot * (2 * kTileBytes);
    }

    // Attends to a round's tiles; of this warp's 8 tokens of tile i the first count - 64 i exist.
    __device__ __forceinline__ void update(const uint32_t (&slot)[2], int count, int warp, int lane) {
        const int g = lane >> 2, t = lane & 3;
        uint4 k[kRound][kPieces], v[kRound][2][kHalves];
#pragma unroll
        for (int i = 0; i < kRound; ++i)
#pragma unroll
            for (int j = 0; j < kPieces;
                 ++j)  // neighbouring tokens in another order, so that they read different banks
                k[i][j] = load_shared(tile_of(slot, i) + (warp * 8 + g) * kRowBytes + (j ^ (g & 1)) * 64 + t * 16);
#pragma unroll
        for (int i = 0; i < kRound; ++i)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int h = 0; h < kHalves; ++h) {
                    v[i][n][h] = load_shared(tile_of(slot, i) + kTileBytes + (warp * 8 + 2 * t + n) * kRowBytes +
                                             h * 128 + g * 16);
                    // Past the context's end lies whatever was there, NaN perhaps, which a weight of 0 does not remove.
                    if (2 * t + n >= count - i * kTileTokens) v[i][n][h] = make_uint4(0, 0, 0, 0);
                }
        float score[kRound][2], largest = maximum;
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
            float c[2][4] = {};
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                const uint4 piece = g & 1 ? k[i][j ^ 1] : k[i][j];
                multiply(c[0], q[2 * j], piece.x, piece.y);
                multiply(c[1], q[2 * j + 1], piece.z, piece.w);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                score[i][n] = c[0][n] + c[0][n + 2] + c[1][n] + c[1][n + 2];
                if (2 * t + n >= count - i * kTileTokens) score[i][n] = -INFINITY;
                largest = fmaxf(largest, score[i][n]);
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        if (__any_sync(0xffffffffu, largest > maximum)) {
            const float factor = common::exp2_fast(maximum - largest);
            maximum = largest;
            sum *= factor;
#pragma unroll
            for (int i = 0; i < 8 * kHalves; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][e] *= factor;
        }
#pragma unroll
        for (int i = 0; i < kRound; i += 2) {
            if (i > 0 && count <= i * kTileTokens) break;
            uint32_t weight[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float first = common::exp2_fast(score[i + n][0] - maximum),
                            second = common::exp2_fast(score[i + n][1] - maximum);
                sum += first + second;
                split(first, second, weight[2 * n], weight[2 * n + 1]);
            }
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
                const uint4 a = v[i][0][h], b = v[i][1][h], a2 = v[i + 1][0][h], b2 = v[i + 1][1][h];
                const auto both = [&](int e, uint32_t a, uint32_t b, uint32_t a2, uint32_t b2) {
                    multiply(out[8 * h + 2 * e], weight, __byte_perm(a, b, 0x5410), __byte_perm(a2, b2, 0x5410));
                    multiply(out[8 * h + 2 * e + 1], weight, __byte_perm(a, b, 0x7632), __byte_perm(a2, b2, 0x7632));
                };
                both(0, a.x, b.x, a2.x, b2.x);
                both(1, a.y, b.y, a2.y, b2.y);
                both(2, a.z, b.z, a2.z, b2.z);
                both(3, a.w, b.w, a2.w, b2.w);
            }
        }
    }

    // The warp's partial result to shared memory.
    __device__ __forceinline__ void store(float* scratch, float2* state, int group, int warp, int lane) {
        const int g = lane >> 2, t = lane & 3;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (g >= group) return;
        float* head = scratch + (warp * group + g) * (D + kOutPadding) + t * 4;
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const auto element = [&](int e) {
                    const float (&c)[4] = out[8 * h + j % 2 * 4 + e];
                    return c[j / 2] + c[j / 2 + 2];
                };
                *reinterpret_cast<float4*>(head + h * 64 + j * 16) =
                    make_float4(element(0), element(1), element(2), element(3));
            }
        if (t == 0) state[warp * group + g] = make_float2(maximum, sum);
    }
    // Which element of a head the i-th stored float of it is.
    __device__ __forceinline__ static int output_element(int i) {
        return (i & ~63) + (i >> 2 & 3) * 16 + (i >> 4 & 3) * 4 + (i & 3);
    }
};

// Rotates the new key and puts key and value into the cache, for later steps, and into their rows of the tile in the
// ring, where the others are. One warp.
template <int D>
struct Append {
    int64_t target;  // of the key and the value in the cache
    float4 c, s;     // the angles of this lane's four elements

    // Asks for what it needs besides the token's words.
    __device__ __forceinline__ Append(const Params& p, const Step& step, int head, int layer, int lane) {
        const int64_t block = *p.slot * static_cast<int64_t>(p.blocks_per_slot) + step.position / kTileTokens;
        target = layer * p.stride_cache_layer +
                 ((block * p.num_kv_heads + head) * kTileTokens + step.position % kTileTokens) * D;
        const int64_t angle = static_cast<int64_t>(step.position) * (D / 2) + lane * 4 % (D / 2);
        c = __ldg(reinterpret_cast<const float4*>(p.cos + angle));
        s = __ldg(reinterpret_cast<const float4*>(p.sin + angle));
    }

    __device__ __forceinline__ void put(const Params& p, const uint4 (&fresh)[D / 64], uint32_t tile_row,
                                        int lane) const {
#pragma unroll
        for (int i = 0; i < D / 64; ++i) {
            const bool is_value = i * 32 + lane >= D / 4;
            const int d = (i * 32 + lane) % (D / 4) * 4;
            const float sign = d < D / 2 ? -1.f : 1.f;
            const auto turned = [&](uint32_t word, float cosine, float sine) {
                const float x = untag(word), other = __shfl_xor_sync(0xffffffffu, x, D / 8);
                return is_value ? x : x * cosine + sign * other * sine;
            };
            const float x = turned(fresh[i].x, c.x, s.x), y = turned(fresh[i].y, c.y, s.y);
            const float z = turned(fresh[i].z, c.z, s.z), w = turned(fresh[i].w, c.w, s.w);
            const uint2 rounded = {common::Pack<bf16>::from_floats(x, y), common::Pack<bf16>::from_floats(z, w)};
            *reinterpret_cast<uint2*>((is_value ? p.v_cache : p.k_cache) + target + d) = rounded;
            asm volatile(
                "st.shared.v2.u32 [%0], {%1, %2};" ::"r"(tile_row + (is_value ? kTileTokens * D * 2 : 0) + d * 2),
                "r"(rounded.x), "r"(rounded.y)
                : "memory");
        }
        // Before the slot's next copy.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
    }
};

// Output i of the head's group * D, in the order of `output_element`.
template <int D>
__device__ __forceinline__ void publish_output(const Params& p, int head, int i, float value, uint32_t use) {
    const int element = i / D * D + Attention<D>::output_element(i % D);
    publish(p.attn + packet_index(head * p.group * D + element), value, use);
}

// The warps' partial results, into p.attn, or if the head has other blocks, to where they find them.
template <int D>
__device__ __forceinline__ void merge_warps(const Params& p, const AttentionWork& work, const float* scratch,
                                            const float2* states, uint32_t use, int thread) {
    const int group = p.group, outputs = group * D;
    const int row = work.head * p.max_splits + work.split;
#pragma unroll 1
    for (int i = thread; i < outputs; i += kMathThreads) {
        const int g = i / D;
        float2 state[kMathWarps];
        float part[kMathWarps], maximum = Attention<D>::kNoScore, sum = 0.f, out = 0.f;
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w) {
            state[w] = states[w * group + g];
            part[w] = scratch[(w * group + g) * (D + kOutPadding) + i % D];
            maximum = fmaxf(maximum, state[w].x);
        }
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w) {
            const float factor = common::exp2_fast(state[w].x - maximum);
            sum = fmaf(factor, state[w].y, sum);
            out = fmaf(factor, part[w], out);
        }
        if (work.num_splits == 1) {
            publish_output<D>(p, work.head, i, __fdividef(out, sum), use);
            continue;
        }
        publish(p.split_out + row * outputs + i, __float_as_uint(out), use);
        if (i % D == 0) {
            publish(p.split_state + (row * group + g) * 2, __float_as_uint(maximum), use);
            publish(p.split_state + (row * group + g) * 2 + 1, __float_as_uint(sum), use);
        }
    }
}

// The block's share of the outputs, merged over the head's blocks, into p.attn. A warp takes eight at a time, a lane
// two of them and every eighth split: what it polls is 64 bytes a split, and few warps poll.
template <int D>
__device__ __forceinline__ void merge_splits(const Params& p, const AttentionWork& work, uint32_t use, int warp,
                                             int lane) {
    constexpr int kOutputs = 8, kRequests = kMaxSplits / 8;
    const int outputs = p.group * D, share = outputs / work.num_splits;
#pragma unroll 1
    for (int n = warp * kOutputs; n < share; n += kMathWarps * kOutputs) {
        const int i = work.split * share + min(n + lane % 4 * 2, share - 2);
        ulonglong2 out[kRequests], state[kRequests];  // (value, tag) of two outputs, of maximum and sum
        Watchdog watchdog;
        bool done;
        do {
            watchdog.check();
            done = true;
#pragma unroll
            for (int r = 0; r < kRequests; ++r) {
                const int split = r * 8 + lane / 4, row = work.head * p.max_splits + split;
                if (split < work.num_splits) {
                    out[r] = load_volatile(reinterpret_cast<const ulonglong2*>(p.split_out + row * outputs + i));
                    state[r] =
                        load_volatile(reinterpret_cast<const ulonglong2*>(p.split_state + (row * p.group + i / D) * 2));
                } else {
                    const uint64_t tag = static_cast<uint64_t>(use) << 32;
                    out[r] = {tag, tag};
                    state[r] = {tag | __float_as_uint(Attention<D>::kNoScore), tag};
                }
            }
#pragma unroll
            for (int r = 0; r < kRequests; ++r)
                done &= out[r].x >> 32 == use && out[r].y >> 32 == use && state[r].x >> 32 == use &&
                        state[r].y >> 32 == use;
        } while (!__all_sync(0xffffffffu, done));
        const auto value = [](uint64_t pair) { return __uint_as_float(static_cast<uint32_t>(pair)); };
        float largest = Attention<D>::kNoScore, sum = 0.f, first = 0.f, second = 0.f;
#pragma unroll
        for (int r = 0; r < kRequests; ++r) largest = fmaxf(largest, value(state[r].x));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
#pragma unroll
        for (int r = 0; r < kRequests; ++r) {
            const float factor = common::exp2_fast(value(state[r].x) - largest);
            sum = fmaf(factor, value(state[r].y), sum);
            first = fmaf(factor, value(out[r].x), first);
            second = fmaf(factor, value(out[r].y), second);
        }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            first += __shfl_xor_sync(0xffffffffu, first, mask);
            second += __shfl_xor_sync(0xffffffffu, second, mask);
        }
        if (lane < 4 && n + lane * 2 < share) {
            publish_output<D>(p, work.head, i, __fdividef(first, sum), use);
            publish_output<D>(p, work.head, i + 1, __fdividef(second, sum), use);
        }
    }
}

template <int D>
__device__ __forceinline__ void attention(const Params& p, const Step& step, int layer, int warp, int lane,
                                          RingReader& ring, float* scratch, SharedState& shared) {
    const AttentionWork work = attention_of_block(p, step.position, blockIdx.x);
    if (work.head < 0) return;
    // Pinned: addresses derived from the lane are not worth registers that stay taken between layers.
    lane = pinned(lane);
    const uint32_t use = step.first_use + layer;
    const int group = p.group;
    float2* states = reinterpret_cast<float2*>(scratch + kMathWarps * group * (D + kOutPadding));

    using State = Attention<D>;
    const int new_tile = step.position / kTileTokens, new_row = step.position % kTileTokens;
    const bool appends = new_tile < work.tile_end && new_row / 8 == warp;
    const Append<D> append(p, step, work.head, layer, lane);
    State state;
    PROFILE_BEGIN(q_began);
    state.load_words(p, step, use, work.head, group, appends, lane);
    PROFILE_END(shared, 15, q_began);

    PROFILE_BEGIN(tiles_began);
    const int end = min(step.position + 1, work.tile_end * kTileTokens);
#pragma unroll 1
    for (int first = work.tile_begin; first < work.tile_end; first += State::kRound) {
        const bool has_second = first + State::kInSlot < work.tile_end;
        uint32_t slot[2];
        slot[0] = slot[1] = ring.acquire();
        if (has_second) slot[1] = ring.acquire();
        if (appends && new_tile - first < State::kRound)
            append.put(p, state.fresh, State::tile_of(slot, new_tile - first) + new_row * State::kRowBytes, lane);
        const int count = end - first * kTileTokens - warp * 8;
        if (count > 0) state.update(slot, count, warp, lane);
        ring.release(lane);
        if (has_second) ring.release(lane);
    }
    PROFILE_END(shared, 16, tiles_began);

    PROFILE_BEGIN(combine_began);
    state.store(scratch, states, group, warp, lane);
    common::named_sync(1, kMathThreads);
    merge_warps<D>(p, work, scratch, states, use, warp * 32 + lane);
    PROFILE_END(shared, 17, combine_began);
    if (work.num_splits > 1) {
        PROFILE_BEGIN(merge_began);
        merge_splits<D>(p, work, use, warp, lane);
        PROFILE_END(shared, 18, merge_began);
    }

    // The new token must be visible before anything that this block publishes from here on, and so to every loader of
    // the next step.
    if (appends) {
        __threadfence();
        asm volatile("fence.proxy.async.global;" ::: "memory");
        __syncwarp();
    }
}

}  // namespace decode_step
