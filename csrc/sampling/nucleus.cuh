// Whether tokens lie in the nucleus, the likeliest tokens that together reach top-p, without looking for its border: a
// token does if the weight of all greater logits is below the target. One pass answers for several tokens.
#pragma once
#include "sampling/row.cuh"
#include "sampling/row_group.cuh"
#include "sampling/weight.cuh"

namespace sampling {

constexpr int kFinalists = 3;  // tokens that are asked about at once

struct Nucleus {
    static constexpr int kSums = 1 + kFinalists;

    // What to weigh: the logits above each bound. The first bound is that of all logits that take part.
    struct Question {
        Weight weight;
        float bounds[kSums];
        float top_p;
        uint64_t excess;  // weight above the first bound that does not take part
    };

    Question ask;
    uint64_t warps[kWarps][kSums], sums[kSums];
    Exchange<kSums> exchange;

    // The number of bounds, after the first, that lie below the nucleus: the first that does not has less than top_p
    // above it. All threads of the group call it, after `ask` was set and a synchronisation.
    template <typename T>
    __device__ __forceinline__ int outside(const RowGroup& group, const Slice<T>& slice) {
        weigh<false>(group, slice);
        // fp32 settles nearly all: it errs by each thread's additions, by their terms, and by half a unit a logit.
        const double error = ask.weight.error() + slice.tokens_per_thread * 0x1p-24;
        const double margin = 2 * error * __ull2double_rn(sums[0]) + slice.vocab_size;
        const double share = ask.top_p * (__ull2double_rn(sums[0]) - __ull2double_rn(ask.excess));
        int result = 0;
        bool sure = margin < 1e300;
#pragma unroll
        for (int i = 1; i < kSums; ++i) {
            if (sums[i] == 0) continue;  // exactly nothing
            const double beyond = __ull2double_rn(sums[i]) - share;
            if (beyond >= 0) result = i;
            sure = sure && fabs(beyond) > margin;
        }
        if (sure) return result;
        weigh<true>(group, slice);
        const uint64_t target = __double2ull_ru(static_cast<double>(ask.top_p) * __ull2double_rn(sums[0] - ask.excess));
        result = 0;
#pragma unroll
        for (int i = 1; i < kSums; ++i) {
            if (sums[i] > 0 && sums[i] >= target) result = i;
        }
        return result;
    }

  private:
    template <bool kExact, typename T>
    __device__ __forceinline__ void weigh(const RowGroup& group, const Slice<T>& slice) {
        const Weight weight = ask.weight;
        float bounds[kSums];
#pragma unroll
        for (int j = 0; j < kSums; ++j) bounds[j] = ask.bounds[j];
        std::conditional_t<kExact, uint64_t, float> mine[kSums] = {};
        slice.template for_each<sizeof(T) == 2 ? 4 : 1>([&](const Chunk<T>& chunk, int) {
            if (!(chunk.max() > bounds[0])) return;
            float x[kChunk];
            chunk.unpack(x);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                const auto its_weight = [&] {
                    if constexpr (kExact)
                        return weight.of(x[i]);
                    else
                        return weight.about(x[i]);
                }();
#pragma unroll
                for (int j = 0; j < kSums; ++j) {
                    if (x[i] > bounds[j]) mine[j] += its_weight;
                }
            }
        });
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
            uint64_t sum;
            if constexpr (kExact)
                sum = mine[j];
            else
                sum = __float2ull_rn(mine[j] * 0x1p31f);
            sum = warp_sum(sum);
            if (lane == 0) warps[warp][j] = sum;
        }
        __syncthreads();
        if (warp == 0) {
            uint64_t all[kSums];
#pragma unroll
            for (int j = 0; j < kSums; ++j) all[j] = warp_sum(lane < kWarps ? warps[lane][j] : 0);
            const auto said = exchange.swap(group, all);
#pragma unroll
            for (int j = 0; j < kSums; ++j) sums[j] = warp_sum(lane < group.size ? said[lane][j] : 0);
        }
        __syncthreads();
    }
};

}  // namespace sampling
