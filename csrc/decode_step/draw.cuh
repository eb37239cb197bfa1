// Drawing the next token: greedy, or Gumbel-max over what top-k, top-p or min-p leave, as llama3/sampling.py defines it
// and with the integer weights of csrc/sampling, so that the same logits give the same token.
//
// No threshold is searched for. The token with the greatest perturbed score of all is the one to draw if the filters
// leave it, which needs one sum over the vocabulary: the weight of all greater scores stays below the target. If they
// do not leave it, then nothing with that score or a lower one either, and the best of the greater ones is next. With
// top-p 0.9, nine draws in ten are settled by the first.
//
// One round: every block publishes its part of a Ballot, and every block reads them all. Rounds are counted for ever,
// like steps, and take two buffers in turn: who publishes in round n + 2 has read round n + 1, for which everybody had
// read round n.
#pragma once
#include "decode_step/shared_state.cuh"
#include "sampling/cutoff.cuh"
#include "sampling/noise.cuh"

namespace decode_step {

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll 2
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
    }
    return counter;
}

struct Noise {
    float temperature;  // 0: greedy
    uint2 key;
    uint32_t position, request, sample;

    __device__ static Noise load(const Params& p, int position_drawn) {
        Noise n{0.f, {0, 0}, static_cast<uint32_t>(position_drawn), 0, 0};
        if (p.temperature == nullptr) return n;
        n.temperature = *p.temperature;
        n.key = make_uint2(static_cast<uint32_t>(*p.seed), static_cast<uint32_t>(*p.seed >> 32));
        n.request = static_cast<uint32_t>(*p.request);
        n.sample = static_cast<uint32_t>(*p.sample);
        return n;
    }
    __device__ float of(int id) const {
        if (temperature == 0.f) return 0.f;
        const uint4 words = philox(make_uint4(id >> 2, position, request, sample), key);
        return sampling::gumbel((id & 2) ? ((id & 1) ? words.w : words.z) : ((id & 1) ? words.y : words.x));
    }
    __device__ float score(float logit) const { return temperature == 0.f ? logit : __fdiv_rn(logit, temperature); }
};

// The block's part of the vocabulary, in shared memory from its head on.
struct HeadRows {
    float logit[kMaxHeadRows], score[kMaxHeadRows], perturbed[kMaxHeadRows];
};

// Over the warp.
__device__ __forceinline__ Ballot joined(const Ballot& mine) {
    Ballot all;
    all.best = sampling::warp_max(mine.best);
    const uint32_t owners = __ballot_sync(0xffffffffu, mine.best == all.best);
    all.score = __shfl_sync(0xffffffffu, mine.score, __ffs(owners) - 1);
    all.top = __reduce_max_sync(0xffffffffu, mine.top);
    all.total = sampling::warp_sum(mine.total);
    all.above = sampling::warp_sum(mine.above);
    return all;
}

// By one warp, which all has the same ballot.
__device__ __forceinline__ void publish_ballot(const Params& p, const Ballot& b, uint32_t round, int lane) {
    const uint32_t words[kBallotWords] = {static_cast<uint32_t>(b.best >> 32),
                                          static_cast<uint32_t>(b.best),
                                          __float_as_uint(b.score),
                                          b.top,
                                          static_cast<uint32_t>(b.total),
                                          static_cast<uint32_t>(b.above),
                                          static_cast<uint32_t>(b.total >> 32 << 16 | b.above >> 32)};
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kBallotWords; ++i)
        if (lane == i) word = words[i];
    if (lane < kBallotWords)
        publish(p.ballots + ((round & 1) * gridDim.x + blockIdx.x) * kBallotStride + lane, word, round + 1);
}

// Of all math warps; each thread gets the result.
__device__ __forceinline__ Ballot joined_in_block(const Ballot& mine, Ballot* scratch, int warp, int lane) {
    const Ballot of_warp = joined(mine);
    if (lane == 0) scratch[warp] = of_warp;
    common::named_sync(1, kMathThreads);
    return joined(lane < kMathWarps ? scratch[lane] : Ballot{});
}

// All blocks' ballots of one round.
__device__ __forceinline__ Ballot collect(const Params& p, uint32_t round, SharedState& shared, int warp, int lane) {
    Ballot mine{};
    for (int block = pinned(warp * 32 + lane); block < gridDim.x; block += kMathThreads) {
        const uint64_t* from = p.ballots + ((round & 1) * gridDim.x + block) * kBallotStride;
        uint64_t word[kBallotWords];
        Watchdog watchdog;
        for (bool done = false; !done; watchdog.check()) {
            done = true;
#pragma unroll
            for (int i = 0; i < kBallotWords; ++i) word[i] = load_volatile(from + i);
#pragma unroll
            for (int i = 0; i < kBallotWords; ++i) done &= word[i] >> 32 == round + 1;  // tags begin at 1
        }
        const uint64_t best = word[0] << 32 | static_cast<uint32_t>(word[1]);
        if (best > mine.best) mine.best = best, mine.score = __uint_as_float(static_cast<uint32_t>(word[2]));
        mine.top = max(mine.top, static_cast<uint32_t>(word[3]));
        const uint32_t high = static_cast<uint32_t>(word[6]);
        mine.total += static_cast<uint64_t>(high >> 16) << 32 | static_cast<uint32_t>(word[4]);
        mine.above += static_cast<uint64_t>(high & 0xffff) << 32 | static_cast<uint32_t>(word[5]);
    }
    __syncwarp();
    return joined_in_block(mine, shared.ballots[1], warp, lane);
}

// The token that a step draws; `round` is its first one, and the next one that is free afterwards. All math threads
// call it. `rows` is complete once phase `parity` of head_done has ended.
__device__ __forceinline__ int draw_token(const Params& p, const Work& head, uint32_t& round, const HeadRows& rows,
                                          uint32_t parity, int warp, int lane, SharedState& shared) {
    Ballot all = collect(p, round++, shared, warp, lane);
    const float temperature = p.temperature == nullptr ? 0.f : *p.temperature;
    if (temperature == 0.f) return sampling::candidate_id(all.best);
    const float top = sampling::from_ordered(all.top), top_p = *p.top_p, min_p = *p.min_p;
    const int64_t top_k = *p.top_k;
    const bool by_mass = top_p < 1.f, by_count = top_k > 0 && top_k < p.vocab_size;
    if (!(by_mass || by_count || min_p > 0.f) || !(fabsf(__fdiv_rn(top, temperature)) < INFINITY))
        return sampling::candidate_id(all.best);

    const sampling::Weight weight{by_mass, top, fminf(1.44269504f / temperature, 1e37f)};
    const float least = min_p > 0.f ? __fdiv_rn(fminf(top + temperature * logf(min_p), top), temperature) : -INFINITY;
    wait_phase(common::shared_address(&shared.head_done), parity);
    for (;;) {
        const int candidate = sampling::candidate_id(all.best);
        const float score = all.score;
        if (score >= least && !by_mass && !by_count) return candidate;
        Ballot mine{};
#pragma unroll 1
        for (int r = warp * 32 + lane; r < head.num_rows; r += kMathThreads) {
            const float its_score = rows.score[r];
            const uint32_t its_weight = weight.of(rows.logit[r]);
            mine.total += its_weight;
            if (!(its_score > score)) continue;
            mine.above += its_weight;
            const uint64_t next = sampling::pack_candidate(sampling::ordered_for_max(rows.perturbed[r]), head.row + r);
            if (its_score >= least && next > mine.best) mine.best = next, mine.score = its_score;
        }
        __syncwarp();
        mine = joined_in_block(mine, shared.ballots[0], warp, lane);
        if (warp == 0) publish_ballot(p, mine, round, lane);
        all = collect(p, round++, shared, warp, lane);
        const uint64_t target = by_mass ? max(__double2ull_ru(static_cast<double>(top_p) * __ull2double_rn(all.total)),
                                              static_cast<unsigned long long>(1))
                                        : static_cast<uint64_t>(top_k);
        if (score >= least && ((!by_mass && !by_count) || all.above < target)) return candidate;
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

}  // namespace decode_step
