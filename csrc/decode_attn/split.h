// The arithmetic of the schedule: tiles to ranges and back. For host (tests) and device.
#pragma once
#include <cuda_runtime_api.h>

namespace decode_attn {

__host__ __device__ inline int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// 1 / x, to about 1e-7. For x whose inverse is a normal number.
__host__ __device__ inline float inverse(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

// a / b and a % b by a reciprocal, a few cycles where an integer division is a hundred. For 0 <= a < 2^24 (more tiles
// are more bytes than a GPU holds) and quotients below 2^20, or b = 1.
struct Quotient {
    int quotient, remainder;
    __host__ __device__ static Quotient of(int a, int b, float inverse_b) {
        int quotient = static_cast<int>(static_cast<float>(a) * inverse_b), remainder = a - quotient * b;
        const int correction = (remainder >= b) - (remainder < 0);
        return {quotient + correction, remainder - correction * b};
    }
    __host__ __device__ static Quotient of(int a, int b) { return of(a, b, inverse(static_cast<float>(b))); }
};

// Which tiles belong to which range.
struct Split {
    int tiles, base, extra;  // the first `extra` ranges have base + 1 tiles, the others base, until there are no more

    // Long ranges use every block and differ by one tile at most. Short ones are all equal, even if some blocks get
    // none: contexts that are a power of two are then cut evenly, and no block has to finish two pieces of one tile.
    static constexpr int kShort = 32;

    __host__ __device__ static Split of(int tiles, int blocks, float inverse_blocks, int min_tiles) {
        const Quotient share = Quotient::of(tiles, blocks, inverse_blocks);
        if (share.quotient >= kShort && share.quotient >= min_tiles) return {tiles, share.quotient, share.remainder};
        const int equal = share.quotient + (share.remainder > 0), size = equal > min_tiles ? equal : min_tiles;
        return {tiles, size > 1 ? size : 1, 0};
    }
    __host__ __device__ int begin(int range) const {
        const int tile = range * base + (range < extra ? range : extra);
        return tile < tiles ? tile : tiles;
    }
    __host__ __device__ int range_of(int tile) const {
        const int border = extra * (base + 1);
        return tile < border ? Quotient::of(tile, base + 1).quotient
                             : extra + Quotient::of(tile - border, base).quotient;
    }
};

}  // namespace decode_attn
