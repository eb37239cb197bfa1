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
static_assert(kThreads == 8 * kBinGroups && kBinGroups == 4 * kWarps);

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
    // The same for a mass below 2^23, by adding 2^23 in fp32: cheaper, and 0 for -inf too.
    __device__ __forceinline__ uint32_t of_small(float x) const {
        return __float_as_uint(fmaf(relative(x), 0x1p31f, 0x1p23f)) - 0x4B000000u;
    }
};

// One row's search, in shared memory. Weights are those of logits >= floor.
struct Search {
    Weight weight;
    float floor;  // lower logits take no part (-inf: all but -inf do)
    float
        start;  // where the bins of the first round end, a value of T that is at least `floor`; lower logits join only
                // if the target is not reached above. What is lower must have a mass below 2^23 (Weight::of_small)
    float top_p;  // of a mass: `target` is this share of all weight less `excess`, known after the first round
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

// Two in turn: while other blocks still read one, the next round fills the other.
struct Histogram {
    uint32_t low[kBins], high[kBins];  // weights in 64 bits; shared memory adds 32 at a time
    uint64_t groups[kBinGroups];

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = 0;
    }
    __device__ __forceinline__ void add(int bin, uint32_t weight) {
        const uint32_t before = atomicAdd(&low[bin], weight);
        if (before + weight < weight) atomicAdd(&high[bin], 1u);
    }
};

struct CutoffMemory {
    Histogram histograms[2];
    uint64_t totals[kBinGroups], below[kWarps];
    Search search;
    int rounds;  // of all searches so far

    // Joins the group's histograms, finds the first bin at which the weight, from the top, reaches the target, and
    // advances the search.
    template <typename T>
    __device__ __forceinline__ void find(const RowGroup& group, Histogram& histogram, uint64_t below_bins) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        below_bins = warp_sum(below_bins);
        if (lane == 0) below[warp] = below_bins;
        __syncthreads();
        for (int number = warp; number < kBinGroups; number += kWarps) {
            const int bin = number * kBinsPerGroup + lane;
            uint64_t weight = 0;
            if (number < kBelow) {
                weight = static_cast<uint64_t>(histogram.high[bin]) << 32 | histogram.low[bin];
            } else if (lane < kWarps) {
                weight = below[lane];
            }
            weight = warp_sum(weight);
            if (lane == 0) histogram.groups[number] = weight;
        }
        group.sync();

        // Eight threads a bin group, each for every eighth block.
        uint64_t sum = 0;
        for (uint32_t block = threadIdx.x % 8; block < group.size; block += 8) {
            sum += group.load(&histogram.groups[threadIdx.x / 8], block);
        }
#pragma unroll
        for (int mask = 4; mask > 0; mask >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, mask);
        if (threadIdx.x % 8 == 0) totals[threadIdx.x / 8] = sum;
        __syncthreads();

        if (warp == 0) {
            const uint64_t first = totals[2 * lane], second = 2 * lane + 1 < kBelow ? totals[2 * lane + 1] : 0;
            const uint64_t through = warp_inclusive_sum(first + second, lane);
            const uint64_t in_bins = __shfl_sync(kAllLanes, through, 31);
            const uint64_t target = search.target_of(in_bins + totals[kBelow]);
            int hit_bin = -1;
            uint64_t above = in_bins, at = 0;
            if (in_bins >= target) {
                const int owner = __ffs(__ballot_sync(kAllLanes, through >= target)) - 1;
                const bool in_first = through - second >= target;
                const int number = __shfl_sync(kAllLanes, 2 * lane + (in_first ? 0 : 1), owner);
                const uint64_t before = __shfl_sync(kAllLanes, through - second - (in_first ? first : 0), owner);
                const int bin = number * kBinsPerGroup + lane;
                uint64_t weight = 0;
                for (uint32_t block = 0; block < group.size; ++block) {
                    weight += static_cast<uint64_t>(group.load(&histogram.high[bin], block)) << 32 |
                              group.load(&histogram.low[bin], block);
                }
                const uint64_t reached = before + warp_inclusive_sum(weight, lane);
                const int hit = __ffs(__ballot_sync(kAllLanes, reached >= target)) - 1;
                hit_bin = number * kBinsPerGroup + hit;
                above = __shfl_sync(kAllLanes, reached - weight, hit);
                at = __shfl_sync(kAllLanes, weight, hit);
            }
            if (lane == 0) {
                search.target = target;
                search.advance<T>(hit_bin, above, at);
                ++rounds;
            }
        }
        __syncthreads();
    }

    // Runs the search that thread 0 has set up; all threads of the group call it and find the result in `search`.
    template <typename T>
    __device__ __forceinline__ void run(const RowGroup& group, const Slice<T>& slice) {
        do {
            Histogram& histogram = histograms[rounds % 2];
            if (rounds >= 2) {
                histogram.clear();
                __syncthreads();
            }
            const Weight weight = search.weight;
            const int shift = search.shift;
            uint64_t below = 0;
            if (search.first) {
                const int highest = search.highest;
                const float start = search.start, floor = search.floor, skipped = weight.is_mass ? floor : start;
                slice.template for_each<2>([&](const Chunk<T>& chunk, int) {
                    const float greatest = chunk.max();
                    if (greatest < skipped) return;
                    float x[kChunk];
                    chunk.unpack(x);
                    uint32_t sum = 0;
                    if (greatest < start) {
#pragma unroll
                        for (int i = 0; i < kChunk; ++i) sum += x[i] >= floor ? weight.of_small(x[i]) : 0;
                    } else {
#pragma unroll
                        for (int i = 0; i < kChunk; ++i) {
                            if (x[i] >= start) {
                                histogram.add((highest - ordinal_of(x[i])) >> shift, weight.of(x[i]));
                            } else {
                                sum += x[i] >= floor ? weight.of_small(x[i]) : 0;
                            }
                        }
                    }
                    below += sum;
                });
            } else {
                const uint32_t low_key = search.low_key, high_key = search.high_key;
                const float low_value = value_of<T>(low_key);
                slice.template for_each<2>([&](const Chunk<T>& chunk, int) {
                    if (chunk.max() < low_value) return;
                    float x[kChunk];
                    chunk.unpack(x);
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) {
                        const uint32_t key = key_of<T>(x[i]);
                        if (low_key <= key && key <= high_key)
                            histogram.add((high_key - key) >> shift, weight.of(x[i]));
                    }
                });
            }
            find<T>(group, histogram, below);
        } while (!search.done);
    }
};

}  // namespace sampling
