// The asynchronous matrix product of one warpgroup (wgmma, sm_90a): D [64 x N] += A [64 x 16] B [N x 16]^T, A and B of
// 16-bit elements in shared memory.
//
// Operands lie in shared memory as rows of 64 elements (128 bytes) along the inner dimension, the 16-byte chunk c of
// row r at c ^ (r % 8): what the copy engine's 128-byte swizzle writes. Groups of 8 rows (1024 bytes, aligned to as
// much) follow each other.
//
// Fragment of D, for thread t of the warpgroup: d[4 j + 2 h + i] is row 16 (t / 32) + (t % 32) / 4 + 8 h,
// column 8 j + 2 (t % 4) + i.
#pragma once
#include "common/types.cuh"

namespace common {

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

// `accumulate` 0 starts anew. Elements of type T, N = kColumns.
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate);

// Operands of an asm statement are numbered, and the accumulators come first: so one for each number of columns.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
// clang-format off
#define R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R24 R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R32 R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R48 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R56 R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define R64 R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R80 R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define R96 R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define R112 R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define R128 R112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on
#define WGMMA(type, name, columns, registers, a_, b_, p_, ...)                                                     \
    template <>                                                                                                    \
    __device__ __forceinline__ void wgmma<type, columns>(float (&d)[columns / 2], uint64_t a, uint64_t b,          \
                                                         int accumulate) {                                         \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " p_                                                           \
                     ", 0;\n"                                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" registers "}, " a_ \
                     ", " b_ ", p, 1, 1, 0, 0;}"                                                                   \
                     : __VA_ARGS__                                                                                 \
                     : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }
WGMMA(__nv_bfloat16, "bf16", 16, R8, "%8", "%9", "%10", D8(0))
WGMMA(__nv_bfloat16, "bf16", 32, R16, "%16", "%17", "%18", D16(0))
WGMMA(__nv_bfloat16, "bf16", 48, R24, "%24", "%25", "%26", D16(0), D8(16))
WGMMA(__nv_bfloat16, "bf16", 64, R32, "%32", "%33", "%34", D32(0))
WGMMA(__nv_bfloat16, "bf16", 96, R48, "%48", "%49", "%50", D32(0), D16(32))
WGMMA(__nv_bfloat16, "bf16", 112, R56, "%56", "%57", "%58", D32(0), D16(32), D8(48))
WGMMA(__nv_bfloat16, "bf16", 128, R64, "%64", "%65", "%66", D64(0))
WGMMA(__nv_bfloat16, "bf16", 192, R96, "%96", "%97", "%98", D64(0), D32(64))
WGMMA(__nv_bfloat16, "bf16", 224, R112, "%112", "%113", "%114", D64(0), D32(64), D16(96))
WGMMA(__nv_bfloat16, "bf16", 256, R128, "%128", "%129", "%130", D64(0), D64(64))
WGMMA(__half, "f16", 256, R128, "%128", "%129", "%130", D64(0), D64(64))
#undef WGMMA
#undef R128
#undef R112
#undef R96
#undef R80
#undef R64
#undef R56
#undef R48
#undef R32
#undef R24
#undef R16
#undef R8
#undef D64
#undef D32
#undef D16
#undef D8
#undef D4

}  // namespace common
