// What the host tells the skinny matrix product, and every constant that host and device must agree on.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace linear {

constexpr int kInner = 64;         // inner elements of a stage: one 128-byte swizzled row
constexpr int kMaxTileRows = 128;  // weight rows of a tile: 64 for each consumer warpgroup
constexpr int kMaxCluster = 8;     // blocks of a cluster: `splits` parts of the inner dimension times `sharers` tiles
constexpr int kMaxStages = 12;
constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kProducerThreads = 32;
constexpr int kThreads = kConsumerThreads + kProducerThreads;

// What becomes of the product y = x weight^T, [num_tokens, num_rows].
enum class Epilogue : int {
    kStore = 0,   // out = y
    kAdd = 1,     // out = residual + y
    kSwiGlu = 2,  // out = silu(gate) * up, [num_tokens, num_rows / 2]; rows of weight: 8 gates, their 8 ups, the next 8 gates, ...
};

struct Params {
    const void* norm_weight;  // [size], or null: x is taken as it is
    const void* residual;     // [num_tokens, num_rows]
    void* out;
    int num_tokens, num_rows, size;
    int tile_rows;  // weight rows of a tile, a multiple of 16
    int tiles;
    int splits;     // blocks of a cluster that share a tile, each with its part of the inner dimension
    int sharers;    // blocks of a cluster, of neighbouring tiles, that load x together
    int stages;
    int one_tile;   // the block has one tile only: its partial sums may take the place of the ring
    float eps;
    int eager_release;       // wait for a stage's products at once, not a step later
    int trigger_before_end;  // rounds before the last one at which the next kernel may start
};

// Dynamic shared memory, in this order, aligned to 1024 bytes. `tokens` is num_tokens rounded up to what the kernel takes.
struct SharedLayout {
    int stage, partials, stride_partial, sums, barriers, bytes;  // offsets and sizes in bytes; stride_partial in floats

    __host__ __device__ static SharedLayout of(int tile_rows, int tokens, int stages, bool one_tile) {
        SharedLayout layout{};
        layout.stage = (tile_rows + tokens) * kInner * 2;
        // A tile of fewer than 64 rows leaves the last rows of a matrix product to whatever lies behind it in the stage.
        const int ring = stages * layout.stage + (kMaxTileRows - tile_rows) * kInner * 2;
        layout.stride_partial = tile_rows + 4;  // + 4: no bank conflicts
        const int partials = tokens * layout.stride_partial * 4;
        layout.partials = one_tile ? 0 : ring;
        layout.sums = one_tile ? (ring > partials ? ring : partials) : ring + partials;
        layout.barriers = layout.sums + tokens * 4;
        layout.bytes = layout.barriers + 2 * kMaxStages * 8 + 1024;  // 1024: to align the start
        return layout;
    }
};

}  // namespace linear
