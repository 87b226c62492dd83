// Warpgroup matrix products (wgmma) on 64-row tiles in 128-byte-swizzled shared memory.
//
// Shared-memory operands are made of 64 x 64 sub-tiles of 16-bit elements: 64 rows of 128 bytes,
// the 16-byte chunk c of row r stored at chunk c ^ (r % 8), which is what the copy engine writes
// with its 128-byte swizzle. Groups of 8 rows are 1,024 bytes side by side, and start at multiples
// of that; the groups of a sub-tile may be apart.
//
// Accumulator layout of m64nN (PTX ISA, "wgmma ... D fragment"): thread t of the warpgroup holds
// rows 16 * (t / 32) + (t % 32) / 4 + {0, 8} and, of every 8 columns, 2 * (t % 4) + {0, 1}:
// d[4 * j + 2 * h + e] is row + 8 * h, column 8 * j + 2 * (t % 4) + e.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashmla::wgmma {

// Address field of a descriptor for a distance of so many bytes.
__device__ constexpr uint64_t distance(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

constexpr uint64_t kSwizzle128B = uint64_t{1} << 62;

// Rows contiguous along the reduction axis ("K-major"): groups of 8 rows are `group_stride` bytes
// apart, 1,024 in a sub-tile. The leading offset is not used with a swizzle. One step of 16
// elements is distance(32).
__device__ __forceinline__ uint64_t k_major(uint32_t address, int group_stride) {
  return kSwizzle128B | distance(group_stride) << 32 | uint64_t{1} << 16 |
         ((address & 0x3FFFF) >> 4);
}

// Rows contiguous along the output axis ("MN-major", the transposed operand): groups of 64 output
// columns are `column_stride` bytes apart, groups of 8 reduction rows `group_stride`.
__device__ __forceinline__ uint64_t mn_major(uint32_t address, int column_stride,
                                             int group_stride) {
  return kSwizzle128B | distance(group_stride) << 32 | distance(column_stride) << 16 |
         ((address & 0x3FFFF) >> 4);
}

constexpr uint64_t kSwizzle64B = uint64_t{2} << 62;

// The same with rows of 64 bytes: groups of 8 rows are 512 bytes side by side, the 16-byte chunk c
// of row r stored at chunk c ^ (r / 2 % 4).
__device__ __forceinline__ uint64_t k_major_64b(uint32_t address) {
  return kSwizzle64B | distance(512) << 32 | uint64_t{1} << 16 | ((address & 0x3FFFF) >> 4);
}

// Before the first product that uses registers written since.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Ties registers to this point of the program: the compiler may not move their uses across it.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Accumulators of 64 rows x so many columns: half as many registers a thread.
#define FLASHMLA_ACC_8(d, i)                                                            \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), \
      "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define FLASHMLA_ACC_32_FROM(d, i)                                           \
  FLASHMLA_ACC_8(d, i), FLASHMLA_ACC_8(d, i + 8), FLASHMLA_ACC_8(d, i + 16), \
      FLASHMLA_ACC_8(d, i + 24)
#define FLASHMLA_ACC_64(d) FLASHMLA_ACC_32_FROM(d, 0)
#define FLASHMLA_ACC_128(d) FLASHMLA_ACC_32_FROM(d, 0), FLASHMLA_ACC_32_FROM(d, 32)
#define FLASHMLA_ACC_256(d) \
  FLASHMLA_ACC_128(d), FLASHMLA_ACC_32_FROM(d, 64), FLASHMLA_ACC_32_FROM(d, 96)

// clang-format off
#define FLASHMLA_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

#define FLASHMLA_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define FLASHMLA_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define FLASHMLA_REGISTERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// The products of the kernels, for one 16-bit type:
//   m64n64k16_ss:          d (+)= A B^T, A and B in shared memory, both K-major.
//   values_ss, values_rs:  d += A B, A in shared memory (K-major) or in registers, B MN-major, with
//   as
//                          many columns as d has room for.
#define FLASHMLA_DEFINE_WGMMA_VALUES(TYPE, NAME, N, A0, A1, A2, A3, B)                             \
  __device__ __forceinline__ void values_ss(TYPE, float (&d)[N / 2], uint64_t a, uint64_t b) {     \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                            \
        " {" FLASHMLA_REGISTERS_##N "}, " A0 ", " A1 ", p, 1, 1, 0, 1;\n}\n"                       \
        : FLASHMLA_ACC_##N(d)                                                                      \
        : "l"(a), "l"(b));                                                                         \
  }                                                                                                \
  __device__ __forceinline__ void values_rs(TYPE, float (&d)[N / 2], const uint32_t (&a)[4],       \
                                            uint64_t b) {                                          \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                            \
        " {" FLASHMLA_REGISTERS_##N "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 1;\n}\n" \
        : FLASHMLA_ACC_##N(d)                                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                     \
  }

#define FLASHMLA_DEFINE_WGMMA(TYPE, NAME)                                                      \
  __device__ __forceinline__ void m64n64k16_ss(TYPE, float (&d)[32], uint64_t a, uint64_t b,   \
                                               bool accumulate) {                              \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" FLASHMLA_REGISTERS_64 \
        "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                     \
        : FLASHMLA_ACC_64(d)                                                                   \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                  \
  }                                                                                            \
  FLASHMLA_DEFINE_WGMMA_VALUES(TYPE, NAME, 128, "%64", "%65", "%66", "%67", "%68")             \
  FLASHMLA_DEFINE_WGMMA_VALUES(TYPE, NAME, 256, "%128", "%129", "%130", "%131", "%132")

FLASHMLA_DEFINE_WGMMA(__nv_bfloat16, "bf16")
FLASHMLA_DEFINE_WGMMA(__half, "f16")

// Stands for e4m3.
struct E4m3 {};

// narrow_rs: d (+)= A B^T with few columns, A in registers, B in shared memory (K-major), for 16
// elements of the reduction axis, of e4m3 32. KIND: those and the types. FLAGS: signs and, for
// 16-bit types, whether B is transposed.
//
// Sums of e4m3 products are known to keep about 14 bits on sm_90, so only few of them should go to
// one accumulator.
#define FLASHMLA_DEFINE_WGMMA_NARROW(TYPE, KIND, FLAGS, N, ACC, REGISTERS, A0, A1, A2, A3, B, \
                                     ACCUMULATE)                                              \
  __device__ __forceinline__ void narrow_rs(TYPE, float (&d)[N / 2], const uint32_t (&a)[4],  \
                                            uint64_t b, bool accumulate) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                               \
                 ", 0;\n"                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N KIND " {" REGISTERS "}, {" A0 ", " A1 \
                 ", " A2 ", " A3 "}, " B ", p, " FLAGS ";\n}\n"                               \
                 : ACC                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                   "r"(static_cast<int>(accumulate)));                                        \
  }
#define FLASHMLA_DEFINE_WGMMA_NARROW_16(TYPE, KIND, FLAGS)                                        \
  FLASHMLA_DEFINE_WGMMA_NARROW(TYPE, KIND, FLAGS, 16, FLASHMLA_ACC_8(d, 0),                       \
                               "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", \
                               "%13")
#define FLASHMLA_ACC_16(d) FLASHMLA_ACC_8(d, 0), FLASHMLA_ACC_8(d, 8)
#define FLASHMLA_DEFINE_WGMMA_NARROW_32(TYPE, KIND, FLAGS)                                       \
  FLASHMLA_DEFINE_WGMMA_NARROW(TYPE, KIND, FLAGS, 32, FLASHMLA_ACC_16(d), FLASHMLA_REGISTERS_32, \
                               "%16", "%17", "%18", "%19", "%20", "%21")

#define FLASHMLA_DEFINE_WGMMA_NARROW_64(TYPE, KIND, FLAGS)                                       \
  FLASHMLA_DEFINE_WGMMA_NARROW(TYPE, KIND, FLAGS, 64, FLASHMLA_ACC_64(d), FLASHMLA_REGISTERS_64, \
                               "%32", "%33", "%34", "%35", "%36", "%37")

FLASHMLA_DEFINE_WGMMA_NARROW_16(__nv_bfloat16, "k16.f32.bf16.bf16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_16(__half, "k16.f32.f16.f16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_32(__nv_bfloat16, "k16.f32.bf16.bf16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_32(__half, "k16.f32.f16.f16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_32(E4m3, "k32.f32.e4m3.e4m3", "1, 1")
FLASHMLA_DEFINE_WGMMA_NARROW_64(__nv_bfloat16, "k16.f32.bf16.bf16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_64(__half, "k16.f32.f16.f16", "1, 1, 0")
FLASHMLA_DEFINE_WGMMA_NARROW_64(E4m3, "k32.f32.e4m3.e4m3", "1, 1")

#undef FLASHMLA_DEFINE_WGMMA_NARROW_16
#undef FLASHMLA_DEFINE_WGMMA_NARROW_32
#undef FLASHMLA_DEFINE_WGMMA_NARROW_64
#undef FLASHMLA_DEFINE_WGMMA_NARROW
#undef FLASHMLA_ACC_16
#undef FLASHMLA_DEFINE_WGMMA
#undef FLASHMLA_DEFINE_WGMMA_VALUES
#undef FLASHMLA_REGISTERS_256
#undef FLASHMLA_REGISTERS_128
#undef FLASHMLA_REGISTERS_64
#undef FLASHMLA_REGISTERS_32
#undef FLASHMLA_ACC_256
#undef FLASHMLA_ACC_128
#undef FLASHMLA_ACC_64
#undef FLASHMLA_ACC_32_FROM
#undef FLASHMLA_ACC_8

}  // namespace flashmla::wgmma
