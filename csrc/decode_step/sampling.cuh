// Drawing the next token: greedy, or Gumbel-max with the counter-based generator of llama3/sampling.py.
#pragma once
#include "decode_step/packet.cuh"

namespace decode_step {

struct Candidate {
    float score;
    int id;  // -1: none
};

// The better one; among equals the lowest id.
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
    const bool take_b = b.id >= 0 && (a.id < 0 || b.score > a.score || (b.score == a.score && b.id < a.id));
    return take_b ? b : a;
}

__device__ __forceinline__ Candidate warp_best(Candidate c) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        c = better(c, {__shfl_xor_sync(0xffffffffu, c.score, mask), __shfl_xor_sync(0xffffffffu, c.id, mask)});
    return c;
}

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ inline uint4 philox(uint4 counter, uint2 key) {
#pragma unroll 2
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
    }
    return counter;
}

struct Sampler {
    float temperature;  // 0: greedy
    uint2 key;
    uint32_t position, request, sample;

    __device__ static Sampler load(const Params& p, int position_drawn) {
        Sampler s{0.f, {0, 0}, static_cast<uint32_t>(position_drawn), 0, 0};
        if (p.temperature == nullptr) return s;
        s.temperature = *p.temperature;
        s.key = make_uint2(static_cast<uint32_t>(*p.seed), static_cast<uint32_t>(*p.seed >> 32));
        s.request = static_cast<uint32_t>(*p.request);
        s.sample = static_cast<uint32_t>(*p.sample);
        return s;
    }

    // What the argmax over the vocabulary compares.
    __device__ float score(float logit, int id) const {
        if (temperature == 0.f) return logit;
        const uint4 words = philox(make_uint4(id >> 2, position, request, sample), key);
        const uint32_t word = (id & 2) ? ((id & 1) ? words.w : words.z) : ((id & 1) ? words.y : words.x);
        const float uniform = (__uint2float_rn(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
        // The winner is the smallest exponential, so precision is wanted where u is near 0: log1p(-u), not log(u).
        return logit / temperature - logf(-log1pf(-uniform));
    }
};

__device__ __forceinline__ void publish_candidate(const Params& p, Candidate best, uint32_t step_number) {
    publish(p.candidates + blockIdx.x, __float_as_uint(best.score),
            (static_cast<uint32_t>(max(best.id, 0)) << 2) | (step_number & 3u));
}

// The token that step `step_number` drew, from the candidates of all blocks. Called by a whole warp.
__device__ inline int drawn_token(const Params& p, uint32_t step_number) {
    Candidate best{0.f, -1};
    for (int block = threadIdx.x & 31; block < gridDim.x; block += 32) {
        Watchdog watchdog;
        uint64_t pair;
        while ((static_cast<uint32_t>((pair = load_volatile(p.candidates + block)) >> 32) ^ step_number) & 3u)
            watchdog.check();
        best = better(best, {__uint_as_float(static_cast<uint32_t>(pair)), static_cast<int>(pair >> 34)});
    }
    return warp_best(best).id;
}

}  // namespace decode_step
