// The k-th greatest logit of a row, found without sorting.
//
// A round counts the logits by value, in bins, and finds the bin at which the number from the top reaches k. The first
// round has one bin for every bf16 value near the top, so for bf16 logits it is nearly always the last one; later
// rounds split that bin by key until it holds a single value.
#pragma once
#include "sampling/row.cuh"
#include "sampling/row_group.cuh"

namespace sampling {

constexpr int kBinsPerGroup = 32;
constexpr int kBinGroups = 64;
constexpr int kBins = kBinGroups * kBinsPerGroup;
static_assert(kBinGroups == 2 * 32 && kBinGroups % kWarps == 0);  // two groups a lane; the same number a warp

// One row's search, in shared memory.
struct Search {
    float start;  // where the bins of the first round end; lower logits join only if the target is not reached above
    uint32_t target;  // the number wanted; in later rounds without those above the bins

    // This round: logits go to bins by ordinal, down from `highest`, or (later) by key, down from high_key.
    bool first;
    int highest, shift;
    uint32_t low_key, high_key;

    // The result, once `done`: the logit (-inf: all logits are wanted), how many are greater, and how many equal it.
    bool done;
    float value;
    uint32_t above, at;

    template <typename T>
    __device__ void begin(float top, uint32_t limit) {
        constexpr float kReach = 12.f;  // nearly always holds what is searched for
        start = at_or_below<T>(fmaxf(__fsub_rd(top, kReach), -1e38f));
        target = limit, above = 0;
        first = true, done = false;
        highest = ordinal_of(top);
        high_key = key_of<T>(top);
        shift = shift_for(highest - ordinal_of(start));
    }

    // Takes what a round found: the bin that reached the target (-1: none did), the logits above it, and those in it.
    template <typename T>
    __device__ void advance(int bin, uint32_t found_above, uint32_t found_at) {
        above += found_above, target -= found_above, at = found_at;
        if (first && bin >= 0) {
            const int high = highest - (bin << shift), low = max(high - (1 << shift) + 1, ordinal_of(start));
            high_key = min(key_of<T>(highest_of_ordinal(high)), high_key);
            low_key = key_of<T>(lowest_of_ordinal(low));
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

  private:
    __device__ static int shift_for(uint32_t range) {
        int result = 0;
        while (range >> result >= kBins) ++result;
        return result;
    }
};

struct CutoffMemory {
    uint32_t histogram[kBins];                                                             // of this block's slice
    uint64_t groups[kMaxBlocksPerRow][kBinGroups], bins[kMaxBlocksPerRow][kBinsPerGroup];  // of every block of the row
    uint64_t groups_mailbox, bins_mailbox;
    Search search;
    uint32_t rounds;

    // By one thread, before RowGroup::arrive.
    __device__ void init() {
        rounds = 0;
        common::mbarrier_init(common::shared_address(&groups_mailbox), 1);
        common::mbarrier_init(common::shared_address(&bins_mailbox), 1);
    }

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
    }

    // Joins the group's histograms, finds the first bin at which the number, from the top, reaches the target, and
    // advances the search.
    template <typename T>
    __device__ __forceinline__ void find(const RowGroup& group) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const bool alone = group.size == 1;
        if (threadIdx.x == 0 && !alone) {
            common::mbarrier_expect(common::shared_address(&groups_mailbox), group.size * sizeof(groups[0]));
        }
        __syncthreads();
        const uint32_t parity = rounds % 2;
#pragma unroll
        for (int i = 0; i < kBinGroups / kWarps; ++i) {
            const int number = warp + i * kWarps;
            const uint64_t sum = __reduce_add_sync(kAllLanes, histogram[number * kBinsPerGroup + lane]);
            if (alone && lane == 0) groups[0][number] = sum;
            if (!alone && lane < group.size) group.send(&groups[group.rank][number], &groups_mailbox, lane, sum);
        }
        if (alone) __syncthreads();

        if (warp == 0) {
            if (!alone) common::mbarrier_wait(common::shared_address(&groups_mailbox), parity);
            uint32_t first = 0, second = 0;  // two bin groups a lane
            for (uint32_t block = 0; block < group.size; ++block) {
                first += groups[block][2 * lane], second += groups[block][2 * lane + 1];
            }
            const uint32_t through = warp_inclusive_sum(first + second, lane);
            const uint32_t in_bins = __shfl_sync(kAllLanes, through, 31);
            const uint32_t target = search.target;
            const bool found = in_bins >= target;
            const int owner = found ? __ffs(__ballot_sync(kAllLanes, through >= target)) - 1 : 0;
            const bool in_first = through - second >= target;
            const int number = __shfl_sync(kAllLanes, 2 * lane + (in_first ? 0 : 1), owner);
            const uint32_t before = __shfl_sync(kAllLanes, through - second - (in_first ? first : 0), owner);
            uint32_t in_bin = histogram[number * kBinsPerGroup + lane];
            // Even if nothing was found: until these messages are here, no block can send those of the next round.
            if (!alone) {
                if (lane == 0) {
                    common::mbarrier_expect(common::shared_address(&bins_mailbox), group.size * sizeof(bins[0]));
                }
                for (uint32_t block = 0; block < group.size; ++block) {
                    group.send(&bins[group.rank][lane], &bins_mailbox, block, in_bin);
                }
                common::mbarrier_wait(common::shared_address(&bins_mailbox), parity);
                in_bin = 0;
                for (uint32_t block = 0; block < group.size; ++block) in_bin += bins[block][lane];
            }
            const uint32_t within = warp_inclusive_sum(in_bin, lane);
            const uint32_t hits = __ballot_sync(kAllLanes, before + within >= target);
            const int hit = found ? __ffs(hits) - 1 : 0;
            const uint32_t above = before + __shfl_sync(kAllLanes, within - in_bin, hit);
            const uint32_t at = __shfl_sync(kAllLanes, in_bin, hit);
            if (lane == 0) {
                search.advance<T>(found ? number * kBinsPerGroup + hit : -1, found ? above : in_bins, found ? at : 0);
                ++rounds;
            }
        }
        __syncthreads();
    }

    // Leaves the `limit`-th greatest logit of the row, whose greatest is `top`, in `search`. All threads of the group
    // call it, once.
    template <typename T>
    __device__ __forceinline__ void run(const RowGroup& group, const Slice<T>& slice, float top, uint32_t limit) {
        if (threadIdx.x == 0) search.begin<T>(top, limit);
        __syncthreads();
        do {
            if (rounds > 0) {
                clear();
                __syncthreads();
            }
            const int shift = search.shift;
            if (search.first) {
                const int highest = search.highest;
                const float start = search.start;
                slice.for_each_in_turn([&](const Chunk<T>& chunk, int) {
                    if (chunk.max() < start) return;
                    float x[kChunk];
                    chunk.unpack(x);
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) {
                        if (x[i] >= start) atomicAdd(&histogram[(highest - ordinal_of(x[i])) >> shift], 1u);
                    }
                });
            } else {
                const uint32_t low_key = search.low_key, high_key = search.high_key;
                const float low_value = value_of<T>(low_key);
                slice.for_each_in_turn([&](const Chunk<T>& chunk, int) {
                    if (chunk.max() < low_value) return;
                    float x[kChunk];
                    chunk.unpack(x);
#pragma unroll
                    for (int i = 0; i < kChunk; ++i) {
                        const uint32_t below = high_key - key_of<T>(x[i]);
                        if (below <= high_key - low_key) atomicAdd(&histogram[below >> shift], 1u);
                    }
                });
            }
            find<T>(group);
        } while (!search.done);
    }
};

}  // namespace sampling
