// The asynchronous matrix product of one warpgroup (sm_90a): D [64 x N] += A [64 x 16] B [N x 16]^T, N 128, 192 or 256,
// A and B from shared memory.
//
// Both operands lie as rows of 64 elements (128 bytes) along the inner dimension, the 16-byte chunk c of row r at c ^
// (r % 8): what the copy engine's 128-byte swizzle writes. Groups of 8 rows (1024 bytes, aligned to as much) follow
// each other. Fragment of D, for thread t of the warpgroup: d[4 j + 2 h + i] is row 16 (t / 32) + (t % 32) / 4 + 8 h,
// column 8 j + 2 (t % 4) + i.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/types.cuh"

namespace gemm {

// Descriptor of an operand: its address and the 1024 bytes between row groups in units of 16 bytes, and the swizzle.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
    constexpr uint64_t kGroupStride = uint64_t(1024 / 16) << 32, kIgnored = uint64_t(1) << 16;
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return (uint64_t(address & 0x3FFFF) >> 4) | kIgnored | kGroupStride | kSwizzle128;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `kPending` committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define GEMM_D8(i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define GEMM_D32(i) GEMM_D8(i), GEMM_D8(i + 8), GEMM_D8(i + 16), GEMM_D8(i + 24)
#define GEMM_LIST_128                                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GEMM_LIST_144 GEMM_LIST_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define GEMM_LIST_192                                                                                             \
    GEMM_LIST_128                                                                                                 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GEMM_LIST_256                                                                                            \
    GEMM_LIST_192                                                                                                \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// `a`, `b`, `p`: the numbers of the operands behind the accumulators, which are `...`.
#define GEMM_WGMMA(type, rows, a_, b_, p_, ...)                                                           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p_                                                    \
                 ", 0;\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32." type "." type " {" GEMM_LIST_##rows \
                 "}, %" #a_ ", %" #b_ ", p, 1, 1, 0, 0;}"                                                 \
                 : __VA_ARGS__                                                                            \
                 : "l"(a), "l"(b), "r"(accumulate))
#define GEMM_WGMMA_OF(type)                                                         \
    if constexpr (kCount == 64)                                                     \
        GEMM_WGMMA(type, 128, 64, 65, 66, GEMM_D32(0), GEMM_D32(32));               \
    else if constexpr (kCount == 72)                                                \
        GEMM_WGMMA(type, 144, 72, 73, 74, GEMM_D32(0), GEMM_D32(32), GEMM_D8(64));  \
    else if constexpr (kCount == 96)                                                \
        GEMM_WGMMA(type, 192, 96, 97, 98, GEMM_D32(0), GEMM_D32(32), GEMM_D32(64)); \
    else                                                                            \
        GEMM_WGMMA(type, 256, 128, 129, 130, GEMM_D32(0), GEMM_D32(32), GEMM_D32(64), GEMM_D32(96))

// `accumulate` 0 starts anew. d: N / 2 accumulators of a thread.
template <typename T, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
    static_assert(kCount == 64 || kCount == 72 || kCount == 96 || kCount == 128);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        GEMM_WGMMA_OF("bf16");
    } else {
        GEMM_WGMMA_OF("f16");
    }
}

#undef GEMM_WGMMA_OF
#undef GEMM_WGMMA
#undef GEMM_LIST_256
#undef GEMM_LIST_192
#undef GEMM_LIST_144
#undef GEMM_LIST_128
#undef GEMM_D32
#undef GEMM_D8

}  // namespace gemm
