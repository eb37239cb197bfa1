// The inner loop, and who holds which sums: in fragments of 16 rows of weight, a unit, by 16 tokens, a part, of which a
// lane has eight sums in the order of common/wgmma.cuh. Two ways, by what the tensor cores' rows are.
#pragma once
#include <type_traits>

#include "batch_linear/params.h"
#include "common/async.cuh"
#include "common/wgmma.cuh"

namespace batch_linear {

using common::operand, common::wgmma, common::wgmma_fence;

// Whether a multiplication adds to the sums: all but the first of a tile. What the compiler can know of it, it need not
// work out in the loop.
__device__ __forceinline__ bool adds(int step, int panel, int k) {
    return panel > 0 || k > 0 || step > 0;
}

// Weights are rows, 64 for each warpgroup in turn: a warp has a unit of every 128 rows, and all parts.
template <int kTokens, int kRows>
struct WeightRows {
    static constexpr int kGroups = kRows < kShortRows ? 1 : 2, kUnits = kRows < kShortRows ? 1 : kRows / kShortRows;
    static constexpr int kPanels = stage_panels(kTokens, kRows);
    float d[kUnits][kTokens / 2];
    const int warp = common::uniform_warp();
    bool has_rows[kUnits];

    // A warpgroup without rows in the tile would only take the other's time in shared memory. The conditions come from
    // numbers that the compiler knows to be the same for the whole warpgroup, or its instructions would run one by one.
    __device__ explicit WeightRows(const Params& p) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) has_rows[i] = first_row(i) < p.tile_rows;
    }
    __device__ __forceinline__ int first_row(int i) const { return (2 * i + warp / 4) * (kShortRows / 2); }

    // Rows beyond the tile's are whatever lies there; what comes of them is not used.
    __device__ __forceinline__ void multiply(const Params& p, uint32_t weight, uint32_t x, int step) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            if (!has_rows[i]) continue;
            wgmma_fence();
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
                const uint64_t columns = operand(x + panel * panel_bytes(kTokens));
                const uint64_t rows = operand(weight + panel * panel_bytes(p.tile_rows) + panel_bytes(first_row(i)));
#pragma unroll
                for (int k = 0; k < kPanelColumns / 16; ++k)  // 32 bytes further along the rows
                    wgmma<__nv_bfloat16, kTokens>(d[i], rows + 2 * k, columns + 2 * k, adds(step, panel, k));
            }
        }
    }

    // Calls use(unit, part, its sums) for those of the first `units`, which the tile has.
    template <typename Use>
    __device__ __forceinline__ void each(int units, Use use) const {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const int unit = warp + i * kConsumerWarps;
            if (unit >= units) continue;
#pragma unroll
            for (int part = 0; part < kTokens / kPartTokens; ++part) use(unit, part, d[i] + 8 * part);
        }
    }
};

// Tokens are rows, weights columns: a warp has one part, and all units of its warpgroup. One warpgroup alone reads the
// tokens once; two are sooner done with the output.
template <int kRows>
struct TokenRows {
    static constexpr int kGroups = kRows < kShortRows ? 1 : 2, kOwnRows = kRows / kGroups;
    float d[kOwnRows / 2];
    const int group = common::uniform_warp() / 4, part = common::uniform_warp() % 4;

    __device__ explicit TokenRows(const Params& p) {}

    __device__ __forceinline__ void multiply(const Params& p, uint32_t weight, uint32_t x, int step) {
        wgmma_fence();
#pragma unroll
        for (int panel = 0; panel < stage_panels(64, kRows); ++panel) {
            const uint64_t rows = operand(x + panel * panel_bytes(64));
            const uint64_t columns = operand(weight + panel * panel_bytes(p.tile_rows) + panel_bytes(group * kOwnRows));
#pragma unroll
            for (int k = 0; k < kPanelColumns / 16; ++k)
                wgmma<__nv_bfloat16, kOwnRows>(d, rows + 2 * k, columns + 2 * k, adds(step, panel, k));
        }
    }

    template <typename Use>
    __device__ __forceinline__ void each(int units, Use use) const {
#pragma unroll
        for (int i = 0; i < kOwnRows / kUnitRows; ++i) {
            const int unit = group * (kOwnRows / kUnitRows) + i;
            if (unit < units) use(unit, part, d + 8 * i);
        }
    }
};

template <int kTokens, int kRows>
using Sums = std::conditional_t<tokens_are_rows(kTokens), TokenRows<kRows>, WeightRows<kTokens, kRows>>;

}  // namespace batch_linear
