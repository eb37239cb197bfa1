// The asynchronous matrix product of one warpgroup (sm_90a): D [64 x N] += A [64 x 16] B [N x 16]^T in bf16, A and B
// from shared memory, N a multiple of 8.
//
// Fragment of D, for thread t of the warpgroup: d[4 j + 2 h + i] is row 16 (t / 32) + (t % 32) / 4 + 8 h,
// column 8 j + 2 (t % 4) + i.
#pragma once
#include "common/wgmma.cuh"

namespace batch_linear {

using common::operand, common::wgmma_commit, common::wgmma_fence, common::wgmma_wait;

// `accumulate` 0 starts anew.
template <int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate);

// Operands of an asm statement are numbered, and the accumulators come first: so one for each number of columns.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
// clang-format off
#define R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define R24 R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R32 R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R48 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R64 R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on
#define WGMMA(columns, registers, a_, b_, p_, ...)                                                                    \
    template <>                                                                                                       \
    __device__ __forceinline__ void wgmma<columns>(float (&d)[columns / 2], uint64_t a, uint64_t b, int accumulate) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " p_                                                              \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" registers "}, " a_ ", " b_    \
                     ", p, 1, 1, 0, 0;}"                                                                              \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b), "r"(accumulate));                                                              \
    }
WGMMA(32, R16, "%16", "%17", "%18", D16(0))
WGMMA(48, R24, "%24", "%25", "%26", D16(0), D8(16))
WGMMA(64, R32, "%32", "%33", "%34", D32(0))
WGMMA(96, R48, "%48", "%49", "%50", D32(0), D16(32))
WGMMA(128, R64, "%64", "%65", "%66", D32(0), D32(32))
#undef WGMMA
#undef R16
#undef R24
#undef R32
#undef R48
#undef R64
#undef D32
#undef D16
#undef D8
#undef D4

}  // namespace batch_linear
