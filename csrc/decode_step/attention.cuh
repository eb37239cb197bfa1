// The math warps' part of rope, append and attention over the cached context, one kv head and its query heads a block.
//
// Each warp takes 8 tokens of every 64-token tile. A token's row lies in D / 8 lanes (16 bytes each), so one load
// covers 4 tokens (D 64) or 2 (D 128). Scores of 8 tokens x GP heads are summed by halves until each lane holds those
// of one token: bits 2-4 of the lane say which token, bits 0-1 which head.
#pragma once
#include "decode_step/gemv.cuh"

namespace decode_step {

// Sums each of the first N values over the lanes that differ in the bits from kMask down to kLast, by halves:
// afterwards a lane holds max(1, N / lanes) sums, those whose index has the lane's bits on top.
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

template <int D, int GP>
struct Attention {
    static constexpr int kLanes = D / 8;            // lanes a token
    static constexpr int kPerLoad = 32 / kLanes;    // tokens a load
    static constexpr int kLoads = 8 / kPerLoad;     // loads for the warp's 8 tokens
    static constexpr int kTiles = GP == 4 ? 2 : 1;  // tiles at a time: more to do between the waits of softmax
    static_assert(GP == 4 || GP == 8, "fewer heads are padded to 4");
    static constexpr int kScores = GP / 4;     // scores a lane holds after summing
    static constexpr float kNoScore = -1e30f;  // the maximum of nothing, finite so that differences are

    // With 8 heads, q and out together are too many registers: q then stays in shared memory.
    static constexpr bool kHoldsQ = GP <= 4;

    float q[kHoldsQ ? GP * 8 : 8], out[GP * 8] = {};  // [head][element of this lane's column]
    const float* shared_q;
    float maximum[kScores], sum[kScores];
    int lane, column, member;  // this lane's 16-byte column of a row, and its token among those of one load

    // `heads` is how many of the GP heads exist; the others' q must read as 0.
    __device__ Attention(int lane, const float* shared_q, int heads)
        : shared_q(shared_q), lane(lane), column(lane % kLanes), member(lane / kLanes) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) maximum[i] = kNoScore, sum[i] = 0.f;
        if constexpr (kHoldsQ) {
#pragma unroll
            for (int g = 0; g < GP; ++g) {
                if (g < heads) {
                    load_q(g, q + g * 8);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; ++e) q[g * 8 + e] = 0.f;
                }
            }
        }
    }

    __device__ __forceinline__ void load_q(int g, float* to) const {
        const float4* from = reinterpret_cast<const float4*>(shared_q + g * D + column * 8);
        const float4 a = from[0], b = from[1];
        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
    }

    __device__ static int head_lane(int g) { return g / kScores; }  // bits 0-1 of the lanes that hold head g

    // Twice eight tokens, of which the first count[0] and count[1] in the order (load, member) exist.
    __device__ __forceinline__ void update(const uint4 (&k)[kTiles][kLoads], uint4 (&v)[kTiles][kLoads],
                                           const int (&count)[kTiles]) {
        float scores[kTiles][kLoads * GP];
#pragma unroll
        for (int g = 0; g < GP; ++g) {
            if constexpr (!kHoldsQ) load_q(g, q);
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    float f[8], dot = 0.f;
                    unpack(k[t][i], f);
#pragma unroll
                    for (int e = 0; e < 8; ++e) dot = fmaf(q[(kHoldsQ ? g * 8 : 0) + e], f[e], dot);
                    scores[t][i * GP + g] = dot;
                }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) transposed_sum<kLanes / 2, 1, kLoads * GP>(scores[t], lane);

        float largest[kScores];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            largest[i] = maximum[i];
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                if ((column >> 2) * kPerLoad + member >= count[t]) scores[t][i] = -INFINITY;
                largest[i] = fmaxf(largest[i], scores[t][i]);
            }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2)
                largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], mask));
            grows |= largest[i] > maximum[i];
        }
        if (__any_sync(0xffffffffu, grows)) rescale(largest);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < kScores; ++i) {
                scores[t][i] = exp2f(scores[t][i] - maximum[i]);
                sum[i] += scores[t][i];
            }
            // Past the context's end the ring holds whatever was there, NaN perhaps, which a weight of 0 does not
            // remove.
            if (count[t] < 8) {
#pragma unroll
                for (int i = 0; i < kLoads; ++i)
                    if (i * kPerLoad + member >= count[t]) v[t][i] = make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                float f[8];
                unpack(v[t][i], f);
#pragma unroll
                for (int g = 0; g < GP; ++g) {
                    const int source = member * kLanes + i * 4 + head_lane(g);
                    const float weight = __shfl_sync(0xffffffffu, scores[t][g % kScores], source);
#pragma unroll
                    for (int e = 0; e < 8; ++e) out[g * 8 + e] = fmaf(weight, f[e], out[g * 8 + e]);
                }
            }
        }
    }

    __device__ __forceinline__ void rescale(const float (&largest)[kScores]) {
        float factor[kScores];
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            factor[i] = exp2f(maximum[i] - largest[i]);
            sum[i] *= factor[i];
            maximum[i] = largest[i];
        }
#pragma unroll
        for (int g = 0; g < GP; ++g) {
            const float f = __shfl_sync(0xffffffffu, factor[g % kScores], head_lane(g));
#pragma unroll
            for (int e = 0; e < 8; ++e) out[g * 8 + e] *= f;
        }
    }

    // The warp's partial result to shared memory.
    __device__ __forceinline__ void store(const AttentionScratch& scratch, int warp) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], mask);
        }
        constexpr int kHeld = GP * 8 / kPerLoad;  // elements left to a lane: those from member * kHeld on
        transposed_sum<16, kLanes, GP * 8>(out, lane);
        float* target = scratch.out + warp * GP * D;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int element = member * kHeld + i;
            target[element / 8 * D + column * 8 + element % 8] = out[i];
        }
        if (lane < 4) {
#pragma unroll
            for (int i = 0; i < kScores; ++i)
                scratch.state[warp * GP + lane * kScores + i] = make_float2(maximum[i], sum[i]);
        }
    }
};

// Rotates one head of q (to fp32, scaled) or the new k (to bf16), or copies the new v. One warp an item.
template <int D>
__device__ __forceinline__ void stage_head(const Params& p, const Step& step, uint32_t use, const uint32_t* source,
                                           float* q, bf16* kv, bool rotate, int lane) {
    constexpr int kWords = D / 32;  // elements lane, lane + 32, ...: the first half rotates with the second
    uint32_t word[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = load_volatile(source + lane + i * 32);
    Watchdog watchdog;
    for (;;) {
        uint32_t stale = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) stale |= word[i] ^ use;
        if (__all_sync(0xffffffffu, (stale & 3u) == 0)) break;
        watchdog.check();
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = load_volatile(source + lane + i * 32);
    }
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
        const int d = lane + i * 32;
        const int64_t angle = static_cast<int64_t>(step.position) * (D / 2) + d;
        const float c = rotate ? __ldg(p.cos + angle) : 1.f, s = rotate ? __ldg(p.sin + angle) : 0.f;
        const float a = untag(word[i]), b = untag(word[i + kWords / 2]);
        const float low = a * c - b * s, high = b * c + a * s;
        if (q != nullptr) {
            q[d] = low * p.softmax_scale_log2;
            q[d + D / 2] = high * p.softmax_scale_log2;
        } else {
            kv[d] = __float2bfloat16_rn(low);
            kv[d + D / 2] = __float2bfloat16_rn(high);
        }
    }
}

// All partial results of this block, and then of the head's other blocks, into p.attn.
template <int D, int GP>
__device__ __forceinline__ void merge(const Params& p, const AttentionWork& work, const AttentionScratch& scratch,
                                      uint32_t use, int warp, int lane, SharedState& shared) {
    const int group = p.num_heads / p.num_kv_heads, outputs = group * D, thread = warp * 32 + lane;
    const int row = work.head * p.max_splits + work.split;
    for (int i = thread; i < outputs; i += kMathThreads) {
        const int g = i / D;
        float maximum = Attention<D, GP>::kNoScore, sum = 0.f, out = 0.f;
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w) maximum = fmaxf(maximum, scratch.state[w * GP + g].x);
#pragma unroll
        for (int w = 0; w < kMathWarps; ++w) {
            const float2 state = scratch.state[w * GP + g];
            const float factor = exp2f(state.x - maximum);
            sum = fmaf(factor, state.y, sum);
            out = fmaf(factor, scratch.out[w * GP * D + i], out);
        }
        if (work.num_splits == 1) {
            publish(p.attn + packet_index(work.head * outputs + i), out / sum, use);
            continue;
        }
        publish(p.split_out + row * outputs + i, __float_as_uint(out), use);
        if (i % D == 0) {
            publish(p.split_state + (row * group + g) * 2, __float_as_uint(maximum), use);
            publish(p.split_state + (row * group + g) * 2 + 1, __float_as_uint(sum), use);
        }
    }
    if (work.num_splits == 1) return;

    // Each split's block merges its share of the outputs, `num_splits` lanes an output.
    PROFILE_BEGIN(merge_began);
    const int splits = work.num_splits, share = outputs / splits, split = thread % splits;
    constexpr int kPasses = GP * D / kMathThreads;
    uint64_t value[kPasses], state_max[kPasses], state_sum[kPasses];
    const uint64_t *from[kPasses], *state_from[kPasses];
    int output[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int own = thread / splits + pass * (kMathThreads / splits);
        output[pass] = own < share ? work.split * share + own : -1;
        const int i = max(output[pass], 0), other = work.head * p.max_splits + split;
        from[pass] = p.split_out + other * outputs + i;
        state_from[pass] = p.split_state + (other * group + i / D) * 2;
        value[pass] = load_volatile(from[pass]);
        state_max[pass] = load_volatile(state_from[pass]);
        state_sum[pass] = load_volatile(state_from[pass] + 1);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const auto finish = [use](uint64_t pair, const uint64_t* p) {
            Watchdog watchdog;
            while (static_cast<uint32_t>(pair >> 32) != use) {
                watchdog.check();
                pair = load_volatile(p);
            }
            return __uint_as_float(static_cast<uint32_t>(pair));
        };
        float maximum = finish(state_max[pass], state_from[pass]), sum = finish(state_sum[pass], state_from[pass] + 1);
        float out = finish(value[pass], from[pass]);
        __syncwarp();
        float largest = maximum;
        for (int mask = splits / 2; mask > 0; mask /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
        const float factor = exp2f(maximum - largest);
        sum *= factor, out *= factor;
        for (int mask = splits / 2; mask > 0; mask /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            out += __shfl_xor_sync(0xffffffffu, out, mask);
        }
        if (split == 0 && output[pass] >= 0)
            publish(p.attn + packet_index(work.head * outputs + output[pass]), out / sum, use);
    }
    PROFILE_END(shared, 18, merge_began);
}

template <int D, int GP>
__device__ __forceinline__ void attention(const Params& p, const Step& step, int layer, int warp, int lane,
                                          RingReader& ring, unsigned char* memory, SharedState& shared) {
    const AttentionWork work = attention_of_block(p, step.position, blockIdx.x);
    if (work.head < 0) return;
    // Pinned: addresses derived from the lane are not worth registers that stay taken between layers.
    lane = pinned(lane);
    const AttentionScratch scratch = attention_scratch<D, GP>(memory);
    const uint32_t use = step.first_use + layer;
    const int group =
        p.num_heads / p.num_kv_heads;  // below GP: the last heads of the scratch are never written, nor used
    const bool has_new = work.split == 0;

    PROFILE_BEGIN(q_began);
    const uint32_t* new_k = p.qkv + (p.num_heads + work.head) * D;
    for (int item = warp; item < group + (has_new ? 2 : 0); item += kMathWarps) {
        if (item < group)
            stage_head<D>(p, step, use, p.qkv + (work.head * group + item) * D, scratch.q + item * D, nullptr, true,
                          lane);
        else
            stage_head<D>(p, step, use, item == group ? new_k : new_k + p.num_kv_heads * D, nullptr,
                          item == group ? scratch.k : scratch.v, item == group, lane);
    }
    common::named_sync(1, kMathThreads);
    PROFILE_END(shared, 15, q_began);

    PROFILE_BEGIN(tiles_began);
    Attention<D, GP> state(lane, scratch.q, group);

    constexpr int kLoads = Attention<D, GP>::kLoads, kPerLoad = Attention<D, GP>::kPerLoad;
    constexpr uint32_t kTileBytes = kTileTokens * D * 2;
    const uint32_t lane_offset = (warp * 8 + state.member) * (D * 2) + state.column * 16;
    constexpr int kTiles = Attention<D, GP>::kTiles;
    // The new token is one more tile, of one token, before the others.
#pragma unroll 1
    for (int first = work.tile_begin - (has_new ? 1 : 0); first < work.tile_end; first += kTiles) {
        uint4 k[kTiles][kLoads] = {}, v[kTiles][kLoads] = {};
        int count[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const int tile = first + t;
            if (tile < work.tile_begin) {
                k[t][0] = reinterpret_cast<const uint4*>(scratch.k)[state.column];
                v[t][0] = reinterpret_cast<const uint4*>(scratch.v)[state.column];
                count[t] = warp == 0 ? 1 : 0;
            } else if (tile < work.tile_end) {
                uint32_t chunk = ring.acquire(kTileBytes) + lane_offset;
#pragma unroll
                for (int i = 0; i < kLoads; ++i) k[t][i] = load_shared(chunk + i * kPerLoad * (D * 2));
                chunk = ring.acquire(kTileBytes) + lane_offset;
#pragma unroll
                for (int i = 0; i < kLoads; ++i) v[t][i] = load_shared(chunk + i * kPerLoad * (D * 2));
                ring.release(lane);
                ring.release(lane);
                count[t] = step.position - tile * kTileTokens - warp * 8;
            } else {
                count[t] = 0;
            }
        }
        if (count[0] > 0 || count[kTiles - 1] > 0) state.update(k, v, count);
    }
    PROFILE_END(shared, 16, tiles_began);

    PROFILE_BEGIN(combine_began);
    state.store(scratch, warp);
    common::named_sync(1, kMathThreads);
    merge<D, GP>(p, work, scratch, use, warp, lane, shared);
    PROFILE_END(shared, 17, combine_began);

    // The new token enters the cache for later steps. The fence makes it visible before anything that this block
    // publishes from here on, and so to every loader of the next step.
    if (has_new && warp == 0) {
        if (lane < D / 8) {
            const int64_t block = *p.slot * static_cast<int64_t>(p.blocks_per_slot) + step.position / kTileTokens;
            const int64_t target =
                layer * p.stride_cache_layer +
                ((block * p.num_kv_heads + work.head) * kTileTokens + step.position % kTileTokens) * D;
            reinterpret_cast<uint4*>(p.k_cache + target)[lane] = reinterpret_cast<const uint4*>(scratch.k)[lane];
            reinterpret_cast<uint4*>(p.v_cache + target)[lane] = reinterpret_cast<const uint4*>(scratch.v)[lane];
            __threadfence();
            asm volatile("fence.proxy.async.global;" ::: "memory");
        }
        __syncwarp();
    }
}

}  // namespace decode_step
