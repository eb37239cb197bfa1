// out [T, N] = x [T, K] weight [N, K]^T (+ residual) where the output has too few tiles to keep the GPU busy: the inner
// dimension is split as well, and the blocks that share a tile add up their sums through distributed shared memory.
//
// Grid: one cluster for each tile of kShared * 128 tokens by kRows weight rows. Its blocks are kShared (128 tokens
// each) for each of kSplits parts of the inner dimension; with two, they bring half of the weights each and multicast
// them. Two warpgroups of a block multiply, 64 tokens each; a thread of the third loads 64 columns of the inner
// dimension a stage into a ring, and asks for weights, which are constants, before the previous kernel has ended.
//
// Block `split` of a tile finishes part `split` of its rows: a thread sends the rest of its accumulators to the threads
// of the same number in the blocks that finish them, and adds what it gets to its own in the order of the parts, so
// that a repeat is bitwise equal.
#pragma once
#include "common/async.cuh"
#include "common/cluster.cuh"
#include "common/types.cuh"
#include "gemm/copy.cuh"
#include "gemm/kernel.cuh"
#include "gemm/wgmma.cuh"

namespace gemm {

constexpr int kMathThreads = kMathGroups * 128;

template <int kRows_, int kSplits_, int kShared_>
struct SplitShape {
    static constexpr int kRows = kRows_, kSplits = kSplits_, kShared = kShared_;
    static constexpr int kBlocks = kSplits * kShared;  // of a cluster
    static constexpr int kBoxRows = kRows / kShared;   // of weights, that a block brings
    static constexpr int kStageBytes = kXBytes + kRows * kStageColumns * 2;
    static constexpr int kUnits = kRows / 8;                            // of 8 rows: four accumulators of a thread
    static constexpr int kOwnUnits = (kUnits + kSplits - 1) / kSplits;  // of a block, fewer of the last
    static constexpr int kUnitBytes = kMathThreads * 16;
    static constexpr int kReceivedBytes = (kSplits - 1) * kOwnUnits * kUnitBytes;
    static constexpr int kStages = (225 << 10) / kStageBytes;
    static constexpr int kReceivedSlots = (kReceivedBytes + kStageBytes - 1) / kStageBytes;  // of the ring, used again
    static constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 8 * (2 * kStages + 1);  // alignment, barriers
    static_assert(kBoxRows % 8 == 0 && kReceivedSlots < kStages);
};

struct SplitMaps {
    CUtensorMap x, weight;  // boxes of 128 and kBoxRows rows by 64 columns
};

struct SplitParams {
    const void* residual;  // may be absent
    void* out;
    int num_tokens, num_rows, tiles_rows;
    int steps;  // of kStageColumns along the inner dimension, at least kSplits
};

// What a block works on.
template <typename Shape>
struct SplitPlace {
    int sharer, split;  // of the tile's tokens, of the inner dimension
    int row, token, first_step, steps;
    __device__ __forceinline__ explicit SplitPlace(const SplitParams& p) {
        const int rank = common::cluster_rank(), tile = blockIdx.x / Shape::kBlocks;
        sharer = rank % Shape::kShared, split = rank / Shape::kShared;
        row = tile % p.tiles_rows * Shape::kRows;
        token = (tile / p.tiles_rows * Shape::kShared + sharer) * kTileTokens;
        first_step = p.steps * split / Shape::kSplits;
        steps = p.steps * (split + 1) / Shape::kSplits - first_step;
    }
    __device__ __forceinline__ int rank_of(int sharer, int split) const { return split * Shape::kShared + sharer; }
    __device__ __forceinline__ int own_units() const {
        return min(Shape::kOwnUnits, Shape::kUnits - split * Shape::kOwnUnits);
    }
};

template <typename Shape>
struct SplitMemory {
    uint32_t base;
    __device__ __forceinline__ uint32_t stage(int slot) const { return base + slot * Shape::kStageBytes; }
    __device__ __forceinline__ uint32_t full(int slot) const { return stage(Shape::kStages) + 8 * slot; }
    __device__ __forceinline__ uint32_t empty(int slot) const { return full(Shape::kStages + slot); }
    __device__ __forceinline__ uint32_t sent() const { return full(2 * Shape::kStages); }
    // Of this thread: what the i-th of the other blocks sent of a unit.
    __device__ __forceinline__ uint32_t received(int i, int unit) const {
        return base + (i * Shape::kOwnUnits + unit) * Shape::kUnitBytes + threadIdx.x * 16;
    }
};

// The ring begins at such a slot that its last step takes the last one: then what the other blocks send can lie in the
// first slots, which are free a few steps before the end.
template <typename Shape>
__device__ __forceinline__ int first_slot(int steps) {
    return (Shape::kStages - steps % Shape::kStages) % Shape::kStages;
}

template <typename Shape>
__device__ void load_part(const SplitMaps& maps, const SplitParams& p, const SplitPlace<Shape>& at,
                          const SplitMemory<Shape>& memory) {
    const int weight_row = at.row + at.sharer * Shape::kBoxRows;
    const auto column = [&](int step) { return (at.first_step + step) * kStageColumns; };
    const auto load_weight = [&](int slot, int step) {
        const uint32_t full = memory.full(slot), weight = memory.stage(slot) + kXBytes;
        common::mbarrier_expect(full, Shape::kStageBytes);
        if (Shape::kShared == 1)
            copy_box(weight, &maps.weight, full, column(step), weight_row);
        else
            copy_box_to_blocks(weight + at.sharer * Shape::kBoxRows * kStageColumns * 2, &maps.weight, full,
                               column(step), weight_row, ((1 << Shape::kShared) - 1) << at.rank_of(0, at.split));
    };
    const auto load_x = [&](int slot, int step) {
        copy_box(memory.stage(slot), &maps.x, memory.full(slot), column(step), at.token);
    };
    const int ahead = min(Shape::kStages, at.steps), first = first_slot<Shape>(at.steps);
    Cursor<Shape::kStages> cursor{first};
    for (int step = 0; step < ahead; ++step, cursor.advance()) load_weight(cursor.slot, step);
    common::mbarrier_expect(memory.sent(), (Shape::kSplits - 1) * at.own_units() * Shape::kUnitBytes);
    common::wait_for_previous_kernel();
    common::allow_next_kernel();
    cursor = {first};
    for (int step = 0; step < ahead; ++step, cursor.advance()) load_x(cursor.slot, step);
    for (int step = ahead; step < at.steps; ++step, cursor.advance()) {
        common::mbarrier_wait(memory.empty(cursor.slot), cursor.parity ^ 1);
        load_weight(cursor.slot, step);
        load_x(cursor.slot, step);
    }
}

// A slot is given back only if it will be filled again: then no arrival is under way when the other block ends.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_part(float (&d)[Shape::kRows / 2], const SplitPlace<Shape>& at,
                                              const SplitMemory<Shape>& memory) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const int may_receive = max(0, at.steps - Shape::kStages + Shape::kReceivedSlots);
    Cursor<Shape::kStages> cursor{first_slot<Shape>(at.steps)};
    int before = 0;
    for (int step = 0; step < at.steps; ++step, cursor.advance()) {
        common::mbarrier_wait(memory.full(cursor.slot), cursor.parity);
        const uint32_t stage = memory.stage(cursor.slot);
        const uint64_t x = operand(stage + group * (kXBytes / kMathGroups)), weight = operand(stage + kXBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStageColumns / 16; ++k)  // 32 bytes further along the rows
            wgmma<T>(d, x + 2 * k, weight + 2 * k, step + k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && step - 1 + Shape::kStages < at.steps && lane < Shape::kShared)
            arrive_in_block(memory.empty(before), at.rank_of(lane, at.split));
        if (step == may_receive) common::cluster_arrive();  // the steps before are done
        before = cursor.slot;
    }
    wgmma_wait<0>();
}

// The accumulators of this block's part of the rows, summed over all parts of the inner dimension.
template <typename Shape>
__device__ __forceinline__ void exchange(const float (&d)[Shape::kRows / 2], const SplitPlace<Shape>& at,
                                         const SplitMemory<Shape>& memory, float (&sum)[Shape::kOwnUnits * 4]) {
    constexpr int kSplits = Shape::kSplits, kUnits = Shape::kUnits, kOwnUnits = Shape::kOwnUnits;
#pragma unroll
    for (int owner = 0; owner < kSplits; ++owner) {
        const float* part = d + owner * kOwnUnits * 4;
        const int rank = at.rank_of(at.sharer, owner), barrier = common::in_block(memory.sent(), rank);
        const uint32_t to = common::in_block(memory.received(at.split - (at.split > owner), 0), rank);
#pragma unroll
        for (int i = 0; i < kOwnUnits * 4; ++i)
            if (owner == 0 || (owner == at.split && owner * kOwnUnits + i / 4 < kUnits)) sum[i] = part[i];
        if (owner == at.split) continue;
#pragma unroll
        for (int i = 0; i < kOwnUnits; ++i)
            if (owner * kOwnUnits + i < kUnits) {
                const float* v = part + 4 * i;
                common::send(to + i * Shape::kUnitBytes, barrier, v[0], v[1], v[2], v[3]);
            }
    }
    common::wait_for_cluster(memory.sent());
#pragma unroll
    for (int from = 0; from < kSplits - 1; ++from)
#pragma unroll
        for (int i = 0; i < kOwnUnits; ++i) {
            if (i >= at.own_units()) continue;
            uint32_t v[4];
            common::load_shared(v, memory.received(from, i));
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[4 * i + j] += __uint_as_float(v[j]);
        }
}

// The outputs of a thread in its block's part of the tile's rows, in pairs of neighbouring rows: kOwnUnits of a token,
// and as many of the token 8 further.
template <typename Shape>
struct SplitOutputs {
    int64_t first, next_token;  // in words
    int tokens_left, rows_left;
    __device__ __forceinline__ SplitOutputs(const SplitParams& p, const SplitPlace<Shape>& at) {
        const int token = at.token + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        const int part = at.split * Shape::kOwnUnits * 8, row = at.row + part + threadIdx.x % 4 * 2;
        first = (int64_t(token) * p.num_rows + row) / 2, next_token = 4 * int64_t(p.num_rows);
        tokens_left = p.num_tokens - token;
        rows_left = min(p.num_rows, at.row + part + at.own_units() * 8) - row;
    }
    // Calls function(i, half, word) for those in the matrix.
    template <typename Function>
    __device__ __forceinline__ void for_each(Function&& function) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < Shape::kOwnUnits; ++i)
                if (tokens_left > 8 * half && rows_left > 8 * i) function(i, half, first + half * next_token + 4 * i);
    }
};

template <typename T, typename Shape>
__device__ __forceinline__ void finish_part(const SplitParams& p, const SplitPlace<Shape>& at,
                                            const SplitMemory<Shape>& memory) {
    constexpr int kOwnUnits = Shape::kOwnUnits;
    common::wait_for_previous_kernel();
    const SplitOutputs<Shape> outputs(p, at);
    float d[Shape::kRows / 2], sum[kOwnUnits * 4];
    multiply_part<T>(d, at, memory);
    uint32_t residual[kOwnUnits][2] = {};
    if (p.residual) {
        const uint32_t* from = static_cast<const uint32_t*>(p.residual);
        outputs.for_each([&](int i, int half, int64_t word) { residual[i][half] = __ldg(from + word); });
    }
    common::cluster_wait();  // every block may receive
    exchange<Shape>(d, at, memory, sum);
    common::cluster_arrive();
    uint32_t* out = static_cast<uint32_t*>(p.out);
    outputs.for_each([&](int i, int half, int64_t word) {
        const float2 added = common::Pack<T>::to_floats(residual[i][half]);
        const float* pair = sum + 4 * i + 2 * half;
        out[word] = common::Pack<T>::from_floats(pair[0] + added.x, pair[1] + added.y);
    });
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 1)
    split_kernel(const __grid_constant__ SplitMaps maps, const __grid_constant__ SplitParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared_memory[];
    const SplitMemory<Shape> memory{(common::shared_address(shared_memory) + 1023) / 1024 * 1024};
    const SplitPlace<Shape> at(p);
    if (threadIdx.x == kMathThreads) {
        constexpr int kReaders = kMathGroups * 4 * Shape::kShared;  // warps
        for (int i = 0; i < Shape::kStages; ++i) {
            common::mbarrier_init(memory.full(i), 1);
            common::mbarrier_init(memory.empty(i), kReaders);
        }
        common::mbarrier_init(memory.sent(), 1);
        // What the ring's first round leaves out counts as done.
        for (int i = 0; i < first_slot<Shape>(at.steps); ++i) {
            common::mbarrier_arrive(memory.full(i));
            arrive_times(memory.empty(i), kReaders);
        }
        common::fence_barrier_init();
    }
    __syncwarp();
    common::cluster_arrive();
    common::cluster_wait();
    if (threadIdx.x >= kMathThreads) {
        lower_registers<kMoveRegisters>();
        if (threadIdx.x == kMathThreads) load_part<Shape>(maps, p, at, memory);
        __syncwarp();
        common::cluster_arrive();  // as the other warps do: nothing is loaded any more
        common::cluster_wait();
        common::cluster_arrive();
    } else {
        raise_registers<kMathRegisters>();
        finish_part<T, Shape>(p, at, memory);
    }
    __syncwarp();
    common::cluster_wait();  // other blocks may still send here
#endif
}

}  // namespace gemm
