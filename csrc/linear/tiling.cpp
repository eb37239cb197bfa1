#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "linear/launch.h"

namespace linear {
namespace {

// Costs in bytes that an SM reads from memory meanwhile, fitted to measurements on an H200 (docs/cuda-ops.md).
constexpr double kTokenBytes = 0.7;    // a byte of x: it comes from L2, which has a limit too
constexpr double kStepBytes = 4096;    // a stage's hand-overs
constexpr double kClusterBytes = 8e3;  // adding up a cluster's partial sums
// Two blocks on an SM: the next kernel's ring fills while this one's drains.
constexpr int kHalfOfShared = (228 * 1024 - 2 * 1024) / 2;

int divide_up(int a, int b) { return (a + b - 1) / b; }

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

int log2_of(int power) {
    int log2 = 0;
    while ((1 << log2) < power) ++log2;
    return log2;
}

Tiling make_tiling(int tokens, int num_rows, int size, const Machine& machine, const Wish& shape) {
    Tiling t{};
    t.tile_rows = shape.tile_rows, t.splits = shape.splits, t.sharers = shape.sharers;
    t.tiles = divide_up(num_rows, t.tile_rows);
    const int cluster = t.splits * t.sharers, wanted = divide_up(t.tiles, t.sharers);
    // A cluster that adds up partial sums has one tile; if not all run at once, the rest follow.
    const int clusters = t.splits > 1 ? wanted : std::min(wanted, std::max(machine.clusters[log2_of(cluster)], 1));
    t.grid = clusters * cluster;
    t.one_tile = clusters == wanted;
    const int limit = t.one_tile && tokens <= 64 ? std::min(kHalfOfShared, machine.shared_limit) : machine.shared_limit;
    const int rounds = divide_up(divide_up(size, kInner), t.splits) * divide_up(wanted, clusters);
    t.stages = std::min(kMaxStages, rounds);
    while (t.stages > 1 && SharedLayout::of(t.tile_rows, tokens, t.stages, t.one_tile).bytes > limit) --t.stages;
    t.shared_bytes = SharedLayout::of(t.tile_rows, tokens, t.stages, t.one_tile).bytes;
    return t;
}

double cost(const Tiling& t, int tokens, int size, const Machine& machine) {
    const int cluster = t.splits * t.sharers;
    const int waves = divide_up(divide_up(t.tiles, t.sharers), std::max(machine.clusters[log2_of(cluster)], 1));
    const int steps = waves * divide_up(divide_up(size, kInner), t.splits);
    return steps * (kInner * 2 * (t.tile_rows + kTokenBytes * tokens / t.sharers) + kStepBytes) + (t.splits > 1 ? kClusterBytes : 0);
}

}  // namespace

int padded_tokens(int num_tokens) {
    int tokens = 8;
    while (tokens < num_tokens) tokens *= 2;
    return tokens;
}

Tiling choose_tiling(int num_tokens, int num_rows, int size, Epilogue epilogue, const Machine& machine, const Wish& wish) {
    require(num_tokens >= 1 && num_tokens <= kMaxTokens, "num_tokens is " + std::to_string(num_tokens) + "; supported: 1 to " + std::to_string(kMaxTokens));
    const int unit = epilogue == Epilogue::kSwiGlu ? 16 : 8;
    require(num_rows >= unit && num_rows % unit == 0, "num_rows is " + std::to_string(num_rows) + "; expected a multiple of " + std::to_string(unit));
    require(size >= 8 && size % 8 == 0, "size is " + std::to_string(size) + "; expected a multiple of 8");
    const int tokens = padded_tokens(num_tokens), steps = divide_up(size, kInner);
    double best = std::numeric_limits<double>::max();
    Tiling chosen{};
    for (int splits = 1; splits <= std::min(kMaxCluster, steps); splits *= 2) {
        for (int sharers = 1; sharers * splits <= kMaxCluster && tokens / sharers >= 8; sharers *= 2) {
            for (int rows = kMaxTileRows; rows >= 16; rows -= 16) {
                if (wish.splits && splits != wish.splits) continue;
                if (wish.sharers ? sharers != wish.sharers : sharers > 2) continue;  // more has not paid
                if (wish.tile_rows && rows != wish.tile_rows) continue;
                const Tiling t = make_tiling(tokens, num_rows, size, machine, {rows, splits, sharers});
                if (t.shared_bytes > machine.shared_limit) continue;
                const double c = cost(t, tokens, size, machine);
                if (c < best) best = c, chosen = t;
            }
        }
    }
    require(chosen.tiles > 0, "no tiling of " + std::to_string(wish.tile_rows) + " rows, " + std::to_string(wish.splits) + " splits and " +
                                  std::to_string(wish.sharers) + " sharers fits");
    return chosen;
}

}  // namespace linear
