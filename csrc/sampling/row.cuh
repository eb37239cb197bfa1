// How a thread block reads its part of a row: chunks of 8 tokens, 16 bytes a load, some loads ahead of their use.
//
// Every pass reads global memory again: what the first pass brought stays in L1 where a row is cut finely enough, in L2
// otherwise.
#pragma once
#include "common/types.cuh"
#include "sampling/ordering.cuh"
#include "sampling/params.h"

namespace sampling {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.402823466e38f;  // the greatest finite one

// Greater of the two; NaN if one is.
__device__ __forceinline__ float max_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
    return common::Pack<T>::to_float(x);
}
template <>
__device__ __forceinline__ float to_float(float x) {
    return x;
}

// 8 neighbours of a row; what lies past the row's end reads as -inf.
template <typename T>
struct Chunk {
    uint32_t words[4];

    __device__ __forceinline__ static Chunk select(bool first, const Chunk& a, const Chunk& b) {
        Chunk result;
#pragma unroll
        for (int i = 0; i < 4; ++i) result.words[i] = first ? a.words[i] : b.words[i];
        return result;
    }

    __device__ __forceinline__ void fill() {
        const float2 none{-kInfinity, -kInfinity};
        for (uint32_t& word : words) word = common::Pack<T>::from_floats(none.x, none.y);
    }
    __device__ __forceinline__ void load_vector(const T* source) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(source);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    }
    __device__ __forceinline__ void load_some(const T* source, int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = 2 * i < count ? to_float(source[2 * i]) : -kInfinity;
            const float high = 2 * i + 1 < count ? to_float(source[2 * i + 1]) : -kInfinity;
            words[i] = common::Pack<T>::from_floats(low, high);
        }
    }
    __device__ __forceinline__ void unpack(float (&x)[kChunk]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = common::Pack<T>::to_floats(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
    // The four with the lower (half 0) or the higher ids; `half` need not be a constant.
    __device__ __forceinline__ void unpack_half(int half, float (&x)[4]) const {
        const float2 first = common::Pack<T>::to_floats(half ? words[2] : words[0]);
        const float2 second = common::Pack<T>::to_floats(half ? words[3] : words[1]);
        x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
    }
    __device__ __forceinline__ float max() const {
        using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        const Pair* pairs = reinterpret_cast<const Pair*>(words);
        const Pair both = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
        const float2 last = common::Pack<T>::to_floats(*reinterpret_cast<const uint32_t*>(&both));
        return max_nan(last.x, last.y);
    }
};

template <>
struct Chunk<float> {
    float values[kChunk];

    __device__ __forceinline__ static Chunk select(bool first, const Chunk& a, const Chunk& b) {
        Chunk result;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) result.values[i] = first ? a.values[i] : b.values[i];
        return result;
    }

    __device__ __forceinline__ void fill() {
        for (float& value : values) value = -kInfinity;
    }
    __device__ __forceinline__ void load_vector(const float* source) {
        const float4* quads = reinterpret_cast<const float4*>(source);
        const float4 a = quads[0], b = quads[1];
        values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
        values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    }
    __device__ __forceinline__ void load_some(const float* source, int count) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[i] = i < count ? source[i] : -kInfinity;
    }
    __device__ __forceinline__ void unpack(float (&x)[kChunk]) const {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) x[i] = values[i];
    }
    __device__ __forceinline__ void unpack_half(int half, float (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = half ? values[i + 4] : values[i];
    }
    __device__ __forceinline__ float max() const {
        float result = values[0];
#pragma unroll
        for (int i = 1; i < kChunk; ++i) result = max_nan(result, values[i]);
        return result;
    }
};

// The chunks [begin, end) of one row.
template <typename T>
struct Slice {
    T* row;
    int begin, end, vocab_size;
    bool vector_loads;

    __device__ static Slice of(const Params& p, int row, int rank) {
        const int begin = rank * p.chunks_per_block, chunks = (p.vocab_size + kChunk - 1) / kChunk;
        return {static_cast<T*>(p.logits) + row * p.stride_logits_row, begin, min(begin + p.chunks_per_block, chunks),
                p.vocab_size, p.vector_loads};
    }
    // visit(chunk, id of its first token); kTogether chunks are loaded before the first is visited. All threads of the
    // block make the same number of visits; a thread that has run out visits a chunk of -inf.
    template <int kTogether, typename Visit>
    __device__ __forceinline__ void for_each(Visit&& visit) const {
        for (int base = begin; base < end; base += kTogether * kThreads) {
            Chunk<T> chunks[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int chunk = base + i * kThreads + threadIdx.x;
                if (chunk >= end) {
                    chunks[i].fill();
                } else if (vector_loads) {
                    chunks[i].load_vector(row + chunk * kChunk);
                } else {
                    chunks[i].load_some(row + chunk * kChunk, vocab_size - chunk * kChunk);
                }
            }
            if constexpr (kTogether ==
                          2) {  // the visit's code once: instructions that a block meets for the first time are slow
#pragma unroll 1
                for (int i = 0; i < 2 && base + i * kThreads < end; ++i) {
                    visit(Chunk<T>::select(i, chunks[1], chunks[0]), (base + i * kThreads + threadIdx.x) * kChunk);
                }
            } else {
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    if (base + i * kThreads < end) visit(chunks[i], (base + i * kThreads + threadIdx.x) * kChunk);
                }
            }
        }
    }
};

}  // namespace sampling
