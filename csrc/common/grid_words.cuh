// Words in global memory by which the blocks of one grid tell each other how far they are (sm_70 and newer).
#pragma once
#include <cstdint>

namespace common {

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t word;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

// Returns what was there before.
__device__ __forceinline__ uint32_t add_acq_rel(uint32_t* to, uint32_t count) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(count) : "memory");
    return before;
}

__device__ __forceinline__ void add_release(uint32_t* to, uint32_t count) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(count) : "memory");
}

// A deadlock is a bug; it ends in an error after some seconds, not in a hung GPU.
constexpr uint32_t kMostSpins = 1u << 23;

// Until `holds(word)`.
template <typename Holds>
__device__ __forceinline__ void wait_for_word(const uint32_t* word, Holds holds) {
    for (uint32_t spins = 0; !holds(load_acquire(word));)
        if (++spins == kMostSpins) __trap();
}

// ---- Words that carry their own validity: a NaN that no sum has stands for nothing.
constexpr uint32_t kEmptyWord = 0xFFFFFFFF;

__device__ __forceinline__ float4 empty() {
    const float word = __uint_as_float(kEmptyWord);
    return {word, word, word, word};
}

// Each of the words arrives by itself.
__device__ __forceinline__ bool is_empty(float4 v) {
    const auto is = [](float word) { return __float_as_uint(word) == kEmptyWord; };
    return is(v.x) || is(v.y) || is(v.z) || is(v.w);
}

__device__ __forceinline__ float4 load_relaxed(const float4* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed(float4* to, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}

}  // namespace common
