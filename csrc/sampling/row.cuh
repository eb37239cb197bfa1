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

// values[i] without local memory.
template <typename V, int kCount>
__device__ __forceinline__ V pick(const V (&values)[kCount], int i) {
    if constexpr (kCount == 8) {
        const V low = i & 2 ? (i & 1 ? values[3] : values[2]) : (i & 1 ? values[1] : values[0]);
        const V high = i & 2 ? (i & 1 ? values[7] : values[6]) : (i & 1 ? values[5] : values[4]);
        return i & 4 ? high : low;
    } else {
        return i & 2 ? (i & 1 ? values[3] : values[2]) : (i & 1 ? values[1] : values[0]);
    }
}

// Two neighbours from one register.
template <typename T>
__device__ __forceinline__ float2 to_floats(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one operation each
        return {bits_float(pair << 16), bits_float(pair & 0xFFFF0000u)};
    }
    return common::Pack<T>::to_floats(pair);
}

// 8 neighbours of a row; what lies past the row's end reads as -inf.
template <typename T>
struct Chunk {
    uint32_t words[4];

    static constexpr uint32_t kNone = std::is_same_v<T, __half> ? 0xFC00 : 0xFF80;  // -inf

    __device__ __forceinline__ void fill() {
        for (uint32_t& word : words) word = kNone << 16 | kNone;
    }
    __device__ __forceinline__ void load_vector(const T* source) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(source);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    }
    __device__ __forceinline__ void load_some(const T* source, int count) {
        const uint16_t* bits = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = 2 * i < count ? bits[2 * i] : kNone;
            words[i] = low | (2 * i + 1 < count ? bits[2 * i + 1] : kNone) << 16;
        }
    }
    __device__ __forceinline__ void unpack(float (&x)[kChunk]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = to_floats<T>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
    __device__ __forceinline__ float at(int i) const {
        const float2 pair = to_floats<T>(pick(words, i / 2));
        return i % 2 ? pair.y : pair.x;
    }
    __device__ __forceinline__ float max() const {
        using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        const Pair* pairs = reinterpret_cast<const Pair*>(words);
        const Pair both = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
        const float2 last = to_floats<T>(*reinterpret_cast<const uint32_t*>(&both));
        return max_nan(last.x, last.y);
    }
};

template <>
struct Chunk<float> {
    float values[kChunk];

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
    __device__ __forceinline__ float at(int i) const { return pick(values, i); }
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
    int tokens_per_thread;  // at most, in all of the row's blocks
    bool vector_loads;

    __device__ static Slice of(const Params& p, int row, int rank) {
        const int begin = rank * p.chunks_per_block, chunks = (p.vocab_size + kChunk - 1) / kChunk;
        return {static_cast<T*>(p.logits) + row * p.stride_logits_row,
                begin,
                min(begin + p.chunks_per_block, chunks),
                p.vocab_size,
                (p.chunks_per_block + kThreads - 1) / kThreads * kChunk,
                p.vector_loads};
    }
    // visit(chunk, id of its first token); kTogether chunks are loaded before the first is visited. All threads of the
    // block make the same number of visits; a thread that has run out visits a chunk of -inf.
    template <int kTogether, typename Visit>
    __device__ __forceinline__ void for_each(Visit&& visit) const {
        for (int base = begin; base < end; base += kTogether * kThreads) {
            Chunk<T> chunks[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) chunks[i] = load(base + i * kThreads);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (base + i * kThreads < end) visit(chunks[i], (base + i * kThreads + threadIdx.x) * kChunk);
            }
        }
    }
    // The same for a long visit, whose code is there once: instructions that a block meets for the first time are slow.
    // The next chunk is loaded before a visit.
    template <typename Visit>
    __device__ __forceinline__ void for_each_in_turn(Visit&& visit) const {
        if constexpr (sizeof(T) > 2) return for_each<1>(visit);  // no registers for two chunks
        Chunk<T> next;
#pragma unroll 1
        for (int base = begin - kThreads; base < end; base += kThreads) {
            const Chunk<T> chunk = next;
            next = load(base + kThreads);
            if (base >= begin) visit(chunk, (base + threadIdx.x) * kChunk);
        }
    }

  private:
    // This thread's of the kThreads chunks from `base` on.
    __device__ __forceinline__ Chunk<T> load(int base) const {
        const int chunk = base + threadIdx.x;
        Chunk<T> result;
        if (chunk >= end) {
            result.fill();
        } else if (vector_loads) {
            result.load_vector(row + chunk * kChunk);
        } else {
            result.load_some(row + chunk * kChunk, vocab_size - chunk * kChunk);
        }
        return result;
    }
};

}  // namespace sampling
