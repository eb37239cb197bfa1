// Floats as integers that compare the same way. Host functions too, so that they can be tested without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#define SAMPLING_BOTH __host__ __device__ __forceinline__

namespace sampling {

SAMPLING_BOTH uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

SAMPLING_BOTH float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

SAMPLING_BOTH uint32_t ordered(float x) {
    const uint32_t bits = float_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

SAMPLING_BOTH float from_ordered(uint32_t key) {
    return bits_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// For the greatest of many: both zeros are equal, and a NaN is greater than all numbers, as in torch.argmax.
SAMPLING_BOTH uint32_t ordered_for_max(float x) {
    return x != x ? 0xFFFFFFFFu : ordered(x + 0.f);
}

// Keys number the values of T in order, without gaps. kGrain: low bits of an fp32 that are always 0 in a T.
template <typename T>
struct Key;
template <>
struct Key<__nv_bfloat16> {
    static constexpr int kGrain = 16;
};
template <>
struct Key<__half> {
    static constexpr int kGrain = 13;
};
template <>
struct Key<float> {
    static constexpr int kGrain = 0;
};

template <typename T>
SAMPLING_BOTH uint32_t key_of(float x) {
    return ordered(x) >> Key<T>::kGrain;
}

template <typename T>
SAMPLING_BOTH float value_of(uint32_t key) {
    constexpr uint32_t kLow = (1u << Key<T>::kGrain) - 1;
    const uint32_t wide = key << Key<T>::kGrain;
    return from_ordered(wide >> 31 ? wide : wide | kLow);
}

// A value of T at or below x, at most two keys away.
template <typename T>
SAMPLING_BOTH float at_or_below(float x) {
    return value_of<T>(key_of<T>(x) - 1);
}

// Ordinals are coarser: one for each bf16 value, but a single one for all |x| < 1/16, where bf16 has half of its
// values.
constexpr int kZeroCode = 0x3CFF;  // upper half of the largest float below 1/32

SAMPLING_BOTH int ordinal_of(float x) {
    const uint32_t bits = float_bits(x);
    const int folded = static_cast<int>(bits >> 16 & 0x7FFF) - kZeroCode;
    const int magnitude = folded > 0 ? folded : 0;
    return bits >> 31 ? -magnitude : magnitude;
}

SAMPLING_BOTH float highest_of_ordinal(int ordinal) {
    return ordinal >= 0 ? bits_float(static_cast<uint32_t>(ordinal + kZeroCode) << 16 | 0xFFFFu)
                        : bits_float(0x80000000u | static_cast<uint32_t>(kZeroCode - ordinal) << 16);
}

SAMPLING_BOTH float lowest_of_ordinal(int ordinal) {
    return ordinal > 0 ? bits_float(static_cast<uint32_t>(ordinal + kZeroCode) << 16)
                       : bits_float(0x80000000u | static_cast<uint32_t>(kZeroCode - ordinal) << 16 | 0xFFFFu);
}

// The bf16 value of any ordinal but 0.
SAMPLING_BOTH float value_of_ordinal(int ordinal) {
    return ordinal > 0 ? lowest_of_ordinal(ordinal) : highest_of_ordinal(ordinal);
}

// The best token so far in one integer: the greater score wins, then the lower id.
SAMPLING_BOTH uint64_t pack_candidate(uint32_t score, uint32_t id) {
    return static_cast<uint64_t>(score) << 32 | ~id;
}
SAMPLING_BOTH uint32_t candidate_id(uint64_t candidate) {
    return ~static_cast<uint32_t>(candidate);
}
SAMPLING_BOTH float candidate_score(uint64_t candidate) {
    return from_ordered(static_cast<uint32_t>(candidate >> 32));
}

}  // namespace sampling
