// The lowest logit that top-k or top-p keeps, found without sorting: the smallest value v of the row for which the
// weight of all logits greater than v is less than a target. A logit weighs 1 (top-k) or its share of the probability
// (top-p).
//
// A round sorts the weights into bins by value and finds the bin that holds v. The first round has one bin for every
// bf16 value near the top, so for bf16 logits it is nearly always the last one; later rounds split that bin by key
// until it holds a single value. Weights are integers, so the result depends neither on the order of the additions nor
// on how a row is cut.
//
// Logits stand for scores (logit / temperature): division by a positive number keeps the order.
#pragma once
#include "sampling/row.cuh"
#include "sampling/row_group.cuh"

namespace sampling {

constexpr int kBinsPerGroup = 32;
constexpr int kBinGroups = 64;
constexpr int kBelow = kBinGroups - 1;  // the last group's place holds the weight of what is left out of the bins
constexpr int kBins = kBelow * kBinsPerGroup;
static_assert(kBinGroups == 2 * 32 && kBinGroups % kWarps == 0);  // two groups a lane; the same number a warp

// Either 1, or the probability over the greatest one in units of 2^-31.
struct Weight {
    bool is_mass;
    float top, scale;  // the row's greatest logit; log2(e) / temperature

    __device__ __forceinline__ float relative(float x) const {
        float result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"((x - top) * scale));
        return result;
    }
    __device__ __forceinline__ uint32_t of(float x) const {
        return is_mass ? __float2uint_rn(relative(x) * 0x1p31f) : 1u;
    }
};

// One row's search, in shared memory. Weights are those of logits >= floor.
struct Search {
    Weight weight;
    float floor;   // lower logits take no part (-inf: all but -inf do)
    float lowest;  // the first round skips lower logits: they take no part, weigh nothing, or need not be weighed
    float start;   // where the bins of the first round end, a value of T that is at least `floor`; lower logits join
                   // only if the target is not reached above
    float top_p;   // of a mass: `target` is this share of all weight less `excess`, known after the first round
    uint64_t excess;
    uint64_t target;  // what the weight of greater logits must stay below; in later rounds without those above the bins

    // This round: values of T go to bins by ordinal, down from `highest`, or (later) by key, down from high_key.
    bool first;
    int highest, shift;
    uint32_t low_key, high_key;

    // The result, once `done`: the lowest value kept (-inf: all), the weight of the values above it, and its own.
    bool done;
    float value;
    uint64_t above, at;

    template <typename T>
    __device__ void begin() {
        first = true, done = false, above = 0;
        highest = ordinal_of(weight.top);
        shift = shift_for(highest - ordinal_of(start));
    }

    // Takes what a round found: the bin that reached the target (-1: none did), the weight of the bins above it, its
    // own, and the weight of all logits.
    template <typename T>
    __device__ void advance(int bin, uint64_t weight_above, uint64_t weight_at) {
        above += weight_above, target -= weight_above, at = weight_at;
        if (first && bin >= 0) {
            const int high = highest - (bin << shift), low = max(high - (1 << shift) + 1, ordinal_of(start));
            high_key = min(key_of<T>(highest_of_ordinal(high)), key_of<T>(weight.top));
            low_key = max(key_of<T>(lowest_of_ordinal(low)), key_of<T>(floor));
        } else if (first) {
            high_key = key_of<T>(start) - 1;
            low_key = key_of<T>(-kLargest);
        } else if (bin >= 0) {
            high_key -= static_cast<uint32_t>(bin) << shift;
            if (high_key - low_key >= 1u << shift) low_key = high_key - (1u << shift) + 1;
        }
        done = bin >= 0 ? low_key == high_key : !first || low_key > high_key;
        value = bin >= 0 ? value_of<T>(low_key) : -kInfinity;
        first = false;
        shift = done ? 0 : shift_for(high_key - low_key);
    }

    __device__ uint64_t target_of(uint64_t total) const {
        if (!first || !weight.is_mass) return target;
        const uint64_t share = __double2ull_ru(static_cast<double>(top_p) * __ull2double_rn(total - excess));
        return share > 0 ? share : 1;
    }

  private:
    __device__ static int shift_for(uint32_t range) {
        int result = 0;
        while (range >> result >= kBins) ++result;
        return result;
    }
};

// Weights by bin, of one block's slice.
struct Histogram {
    uint32_t low[kBins], high[kBins];  // 64 bits; shared memory adds 32 at a time

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = 0;
    }
    __device__ __forceinline__ uint64_t get(int bin) const { return static_cast<uint64_t>(high[bin]) << 32 | low[bin]; }
    __device__ __forceinline__ void add(int bin, uint64_t weight) {
        const uint32_t added = static_cast<uint32_t>(weight);
        const uint32_t carry = atomicAdd(&low[bin], added) + added < added;
        atomicAdd(&high[bin], static_cast<uint32_t>(weight >> 32) + carry);
    }
    // Adds weight(i) to bin(i) for those i of 0 .. 3 that are in; all additions are under way before the first carry is
    // awaited.
    template <typename In, typename Bin, typename GetWeight>
    __device__ __forceinline__ void add_four(In&& in, Bin&& bin, GetWeight&& weight) {
        uint32_t added[4], sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            added[i] = sum[i] = 0;
            if (in(i)) {
                added[i] = weight(i);
                sum[i] = atomicAdd(&low[bin(i)], added[i]) + added[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (sum[i] < added[i]) atomicAdd(&high[bin(i)], 1u);
        }
    }
};

// values[i] without local memory.
__device__ __forceinline__ float pick(const float (&values)[kChunk], int i) {
    const float low = i & 2 ? (i & 1 ? values[3] : values[2]) : (i & 1 ? values[1] : values[0]);
    const float high = i & 2 ? (i & 1 ? values[7] : values[6]) : (i & 1 ? values[5] : values[4]);
    return i & 4 ? high : low;
}

struct CutoffMemory {
    Histogram histogram;
    uint64_t groups[kMaxBlocksPerRow][kBinGroups], bins[kMaxBlocksPerRow][kBinsPerGroup];  // of every block of the row
    uint64_t groups_mailbox, bins_mailbox;
    uint64_t below[kWarps];
    Search search;
    uint32_t rounds;  // of all searches so far

    // By one thread, before RowGroup::arrive.
    __device__ void init() {
        rounds = 0;
        common::mbarrier_init(common::shared_address(&groups_mailbox), 1);
        common::mbarrier_init(common::shared_address(&bins_mailbox), 1);
    }

    // Joins the group's histograms, finds the first bin at which the weight, from the top, reaches the target, and
    // advances the search. `counted`: bins hold numbers of logits, whose weight is that of the bin's value; but the bin
    // of ordinal 0, which has many values, holds a weight.
    template <typename T>
    __device__ __forceinline__ void find(const RowGroup& group, uint64_t below_bins, bool counted) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const bool alone = group.size == 1;
        const Weight weigh = search.weight;
        const int highest = search.highest;
        const auto weight_of = [&](int bin) {
            const uint64_t held = histogram.get(bin);
            if (!counted || bin == highest || held == 0) return held;
            return held * weigh.of(value_of_ordinal(highest - bin));
        };
        below_bins = warp_sum(below_bins);
        if (lane == 0) below[warp] = below_bins;
        if (threadIdx.x == 0 && !alone) {
            common::mbarrier_expect(common::shared_address(&groups_mailbox), group.size * sizeof(groups[0]));
        }
        __syncthreads();
        const uint32_t parity = rounds % 2;
#pragma unroll
        for (int i = 0; i < kBinGroups / kWarps; ++i) {
            const int number = warp + i * kWarps;
            const uint64_t mine =
                number < kBelow ? weight_of(number * kBinsPerGroup + lane) : (lane < kWarps ? below[lane] : 0);
            const uint64_t sum = warp_sum(mine);
            if (alone && lane == 0) groups[0][number] = sum;
            if (!alone && lane < group.size) group.send(&groups[group.rank][number], &groups_mailbox, lane, sum);
        }
        if (alone) __syncthreads();

        if (warp == 0) {
            if (!alone) common::mbarrier_wait(common::shared_address(&groups_mailbox), parity);
            uint64_t first = 0, second = 0;  // two bin groups a lane
            for (uint32_t block = 0; block < group.size; ++block) {
                first += groups[block][2 * lane], second += groups[block][2 * lane + 1];
            }
            const uint64_t left_out = __shfl_sync(kAllLanes, second, kBelow / 2);
            if (lane == kBelow / 2) second = 0;
            const uint64_t through = warp_inclusive_sum(first + second, lane);
            const uint64_t in_bins = __shfl_sync(kAllLanes, through, 31);
            const uint64_t target = search.target_of(in_bins + left_out);
            const bool found = in_bins >= target;
            const int owner = found ? __ffs(__ballot_sync(kAllLanes, through >= target)) - 1 : 0;
            const bool in_first = through - second >= target;
            const int number = __shfl_sync(kAllLanes, 2 * lane + (in_first ? 0 : 1), owner);
            const uint64_t before = __shfl_sync(kAllLanes, through - second - (in_first ? first : 0), owner);
            uint64_t weight = weight_of(number * kBinsPerGroup + lane);
            // Even if nothing was found: until these messages are here, no block can send those of the next round.
            if (!alone) {
                if (lane == 0) {
                    common::mbarrier_expect(common::shared_address(&bins_mailbox), group.size * sizeof(bins[0]));
                }
                for (uint32_t block = 0; block < group.size; ++block) {
                    group.send(&bins[group.rank][lane], &bins_mailbox, block, weight);
                }
                common::mbarrier_wait(common::shared_address(&bins_mailbox), parity);
                weight = 0;
                for (uint32_t block = 0; block < group.size; ++block) weight += bins[block][lane];
            }
            const uint64_t reached = before + warp_inclusive_sum(weight, lane);
            const int hit = found ? __ffs(__ballot_sync(kAllLanes, reached >= target)) - 1 : 0;
            const uint64_t above = __shfl_sync(kAllLanes, reached - weight, hit);
            const uint64_t at = __shfl_sync(kAllLanes, weight, hit);
            __syncwarp();
            if (lane == 0) {
                search.target = target;
                search.advance<T>(found ? number * kBinsPerGroup + hit : -1, found ? above : in_bins, found ? at : 0);
                ++rounds;
            }
        }
        __syncthreads();
    }

    // Runs the search that thread 0 has set up; all threads of the group call it and find the result in `search`.
    template <typename T>
    __device__ __forceinline__ void run(const RowGroup& group, const Slice<T>& slice) {
        do {
            if (rounds > 0) {
                histogram.clear();
                __syncthreads();
            }
            const Weight weight = search.weight;
            const int shift = search.shift;
            // Where a bin holds one value, it is enough to count.
            const bool counted = search.first && shift == 0 && Key<T>::kGrain == 16;
            uint64_t below = 0, at_zero = 0;
            if (counted) {
                const int highest = search.highest;
                const float start = search.start, lowest = search.lowest;
                slice.template for_each<2>([&](const Chunk<T>& chunk, int) {
                    const float greatest = chunk.max();
                    if (greatest < lowest) return;
                    float x[kChunk];
                    chunk.unpack(x);
                    uint32_t weighed = 0;  // a bit a logit: those that are not counted
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) {
                        const int ordinal = ordinal_of(x[i]);
                        const bool in_bins = x[i] >= start;
                        if (in_bins && ordinal != 0) atomicAdd(&histogram.low[highest - ordinal], 1u);
                        weighed |= x[i] >= lowest && !(in_bins && ordinal != 0) ? 1u << i : 0;
                    }
                    while (weighed) {
                        const float one = pick(x, __ffs(weighed) - 1);
                        weighed &= weighed - 1;
                        const uint32_t its_weight = weight.of(one);
                        below += one >= start ? 0 : its_weight;
                        at_zero += one >= start ? its_weight : 0;
                    }
                });
                at_zero = warp_sum(at_zero);
                if (at_zero > 0 && threadIdx.x % 32 == 0) histogram.add(highest, at_zero);
            } else if (search.first) {
                const int highest = search.highest;
                const float start = search.start, lowest = search.lowest;
                slice.template for_each<1>([&](const Chunk<T>& chunk, int) {
                    const float greatest = chunk.max();
                    if (greatest < lowest) return;
                    float x[kChunk];
                    chunk.unpack(x);
#pragma unroll
                    for (int i = 0; i < kChunk; i += 4) {
                        histogram.add_four([&](int j) { return x[i + j] >= start; },
                                           [&](int j) { return (highest - ordinal_of(x[i + j])) >> shift; },
                                           [&](int j) { return weight.of(x[i + j]); });
                    }
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) below += x[i] >= lowest && x[i] < start ? weight.of(x[i]) : 0;
                });
            } else {
                const uint32_t low_key = search.low_key, high_key = search.high_key;
                const float low_value = value_of<T>(low_key);
                slice.template for_each<1>([&](const Chunk<T>& chunk, int) {
                    if (chunk.max() < low_value) return;
                    float x[kChunk];
                    chunk.unpack(x);
#pragma unroll
                    for (int i = 0; i < kChunk; i += 4) {
                        histogram.add_four([&](int j) { return key_of<T>(x[i + j]) - low_key <= high_key - low_key; },
                                           [&](int j) { return (high_key - key_of<T>(x[i + j])) >> shift; },
                                           [&](int j) { return weight.of(x[i + j]); });
                    }
                });
            }
            find<T>(group, below, counted);
        } while (!search.done);
    }
};

}  // namespace sampling
