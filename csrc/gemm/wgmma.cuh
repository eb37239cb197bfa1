// The asynchronous matrix product of one warpgroup (sm_90a): D [64 x 256] += A [64 x 16] B [256 x 16]^T, A and B from
// shared memory.
//
// Fragment of D, for thread t of the warpgroup: d[4 j + 2 h + i] is row 16 (t / 32) + (t % 32) / 4 + 8 h,
// column 8 j + 2 (t % 4) + i.
#pragma once
#include "common/types.cuh"
#include "common/wgmma.cuh"

namespace gemm {

constexpr int kFragment = 128;  // accumulators of a thread

using common::operand, common::wgmma_commit, common::wgmma_fence, common::wgmma_wait;

#define GEMM_D8(i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define GEMM_D32(i) GEMM_D8(i), GEMM_D8(i + 8), GEMM_D8(i + 16), GEMM_D8(i + 24)
#define GEMM_WGMMA(type)                                                                                  \
    asm volatile(                                                                                         \
        "{.reg .pred p; setp.ne.b32 p, %130, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                      \
        " {"                                                                                              \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}" \
        ", %128, %129, p, 1, 1, 0, 0;}"                                                                   \
        : GEMM_D32(0), GEMM_D32(32), GEMM_D32(64), GEMM_D32(96)                                           \
        : "l"(a), "l"(b), "r"(accumulate))

// `accumulate` 0 starts anew.
template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[kFragment], uint64_t a, uint64_t b, int accumulate);

template <>
__device__ __forceinline__ void wgmma<__nv_bfloat16>(float (&d)[kFragment], uint64_t a, uint64_t b, int accumulate) {
    GEMM_WGMMA("bf16");
}

template <>
__device__ __forceinline__ void wgmma<__half>(float (&d)[kFragment], uint64_t a, uint64_t b, int accumulate) {
    GEMM_WGMMA("f16");
}

#undef GEMM_WGMMA
#undef GEMM_D32
#undef GEMM_D8

}  // namespace gemm
