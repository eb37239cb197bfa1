// Weights on their way from memory to L2 before the ring asks for them.
//
// A stage is filled again 1.7 us after it was given back if its weights come from memory, and the ring holds less than
// that. From L2 it takes a third less. Where tiles are so many that they are claimed, weights are in L2 anyway.
#pragma once
#include "common/async.cuh"
#include "gemm/params.h"
#include "gemm/tiles.cuh"

namespace gemm {

constexpr int kAheadSteps = 8;

// A warp's walk over this block's half of each step's weights. 16 bytes of a row bring 256 to L2, two steps' worth.
template <typename Shape>
class WeightsAhead {
  public:
    __device__ __forceinline__ WeightsAhead(const Weight& weight, const TileWalk& walk, int rank, uint32_t unused)
        : weight_(weight), walk_(walk), first_row_(rank * kRows), unused_(unused) {
        if (!walk_.t.claimed) take_tile();
    }

    __device__ __forceinline__ void advance(bool asks) {
        if (walk_.t.claimed || walk_.done()) return;
        if (asks && (step_ == 0 || (tile_.first + step_) % 2 == 0)) ask();
        if (++step_ < tile_.steps) return;
        walk_.advance();
        take_tile();
    }

  private:
    static constexpr int kRows = Shape::kRows / kCluster;

    __device__ __forceinline__ void take_tile() {
        step_ = 0;
        if (!walk_.done()) tile_ = tile_at<Shape::kSplits>(walk_.t, walk_.index);
    }

    __device__ __forceinline__ void ask() {
        const uint8_t* column = weight_.data + int64_t(tile_.first + step_) * (kStageColumns * 2);
#pragma unroll
        for (int i = 0; i < kRows; i += 32) {
            const int of_block = i + threadIdx.x % 32, row = tile_.row * Shape::kRows + first_row_ + of_block;
            if (of_block < kRows && row < weight_.rows)
                common::cp_async_16_of_256(unused_, column + int64_t(row) * weight_.row_bytes);
        }
    }

    const Weight& weight_;
    TileWalk walk_;
    int first_row_, step_ = 0;
    uint32_t unused_;
    Tile tile_;
};

}  // namespace gemm
