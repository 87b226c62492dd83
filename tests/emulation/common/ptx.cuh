// In place of csrc/common/ptx.cuh: what the kernels that are emulated use of it.
#pragma once

#include <cuda.h>

#include <array>

#include "simt.h"

namespace flashmla::ptx {

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

template <typename T>
uint32_t pack(float lo, float hi);

template <>
inline uint32_t pack<__half>(float lo, float hi) {
  const auto bits = [](float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); };
  return bits(lo) | static_cast<uint32_t>(bits(hi)) << 16;
}

template <>
inline uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  const auto bits = [](float x) {
    if (std::isnan(x)) return 0x7fffu;
    const uint32_t word = std::bit_cast<uint32_t>(x);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  };
  return bits(lo) | bits(hi) << 16;
}

template <typename T>
float2 unpack(uint32_t pair);

template <>
inline float2 unpack<__half>(uint32_t pair) {
  return __half22float2(std::bit_cast<__half2>(pair));
}

template <>
inline float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return {std::bit_cast<float>(pair << 16), std::bit_cast<float>(pair & 0xffff0000)};
}

// ---------------------------------------------------------------------------------------------
// Shared memory. Addresses are distances from its begin.

inline uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - simt::dynamic_shared);
}
inline char* smem_pointer(uint32_t address) { return simt::dynamic_shared + address; }
inline uint8_t* dynamic_smem() { return reinterpret_cast<uint8_t*>(simt::dynamic_shared); }
inline int lane_id() { return static_cast<int>(simt::lane()); }
inline uint32_t uniform(uint32_t x) { return __reduce_max_sync(0xffffffff, x); }
inline uint32_t opaque(uint32_t x) { return x; }

// Aligned, as the GPU wants it; reported as undefined behaviour if not.
template <typename T>
T& smem(uint32_t address) {
  return *reinterpret_cast<T*>(smem_pointer(address));
}
inline uint32_t ld_shared_4(uint32_t address) { return smem<uint32_t>(address); }
inline uint2 ld_shared_8(uint32_t address) { return smem<uint2>(address); }
inline uint4 ld_shared_16(uint32_t address) { return smem<uint4>(address); }
inline void st_shared_4(uint32_t address, uint32_t x) { smem<uint32_t>(address) = x; }
inline void st_shared_8(uint32_t address, uint32_t x, uint32_t y) { smem<uint2>(address) = {x, y}; }
inline void st_shared_16(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  smem<uint4>(address) = {r0, r1, r2, r3};
}
inline void st_shared_zero_16(uint32_t address) { smem<uint4>(address) = {0, 0, 0, 0}; }

// ---------------------------------------------------------------------------------------------
// mbarrier: bytes under way, arrivals to come, arrivals of a phase, phase.

struct Phase {
  int64_t bytes : 24;
  uint64_t pending : 12;
  uint64_t arrivals : 12;
  uint64_t parity : 1;
};
static_assert(sizeof(Phase) == 8);

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  *barrier = std::bit_cast<uint64_t>(Phase{0, arrivals, arrivals, 0});
}
// Releases what the thread has written; does not acquire what others have.
template <typename Change>
void mbarrier_change(uint64_t* barrier, const Change& change) {
  std::atomic_ref<uint64_t> word(*barrier);
  uint64_t before = word.load(std::memory_order_relaxed);
  uint64_t after;
  do {
    Phase phase = std::bit_cast<Phase>(before);
    change(phase);
    if (phase.pending == 0 && phase.bytes == 0) {
      phase.pending = phase.arrivals;
      phase.parity ^= 1;
    }
    after = std::bit_cast<uint64_t>(phase);
  } while (!word.compare_exchange_weak(before, after, std::memory_order_release,
                                       std::memory_order_relaxed));
  word.notify_all();
  simt::note_progress();
}
inline void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_change(barrier, [](Phase& phase) { --phase.pending; });
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  mbarrier_change(barrier, [&](Phase& phase) {
    phase.bytes += bytes;
    --phase.pending;
  });
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  std::atomic_ref<uint64_t> word(*barrier);
  while (true) {
    const uint64_t now = word.load(std::memory_order_acquire);
    if (std::bit_cast<Phase>(now).parity != (parity & 1)) return;
    word.wait(now, std::memory_order_relaxed);
  }
}
inline bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  std::atomic_ref<uint64_t> word(*barrier);
  return std::bit_cast<Phase>(word.load(std::memory_order_acquire)).parity != (parity & 1);
}

inline void named_barrier_sync(int id, int threads) {
  simt::named_barrier(id, threads).meet(false);
}
inline bool named_barrier_or(int id, int threads, bool value) {
  return simt::named_barrier(id, threads).meet(value);
}

// Clusters are not emulated, but as one of a single CTA. Kernels that want a second one are
// compiled only.
inline void cluster_sync() { __syncthreads(); }
inline uint32_t cluster_cta_rank() { return 0; }
inline uint32_t cluster_ctas() { return 1; }
inline void cluster_add(int* place, uint32_t rank, int value) {
  if (rank != 0) std::abort();
  atomicAdd(place, value);
}
inline uint32_t map_to_cta(uint32_t, uint32_t) { std::abort(); }
inline void mbarrier_arrive_cluster(uint32_t) { std::abort(); }
inline void st_async_16(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t) {
  std::abort();
}

inline void fence_barrier_init() {}
inline void fence_proxy_async() {}
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}

// ---------------------------------------------------------------------------------------------
// Copies

inline uint64_t evict_first_policy() { return 0; }
inline void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint64_t* barrier,
                      uint64_t) {
  if ((destination | bytes | reinterpret_cast<uintptr_t>(source)) % 16 != 0) std::abort();
  simt::copy_engine.run([=] {
    std::memcpy(smem_pointer(destination), source, bytes);
    mbarrier_change(barrier, [&](Phase& phase) { phase.bytes -= bytes; });
  });
}
inline void prefetch_tensor_map(const CUtensorMap*) {}
// `first`: the coordinates of the box.
inline void load_box(uint32_t target, const CUtensorMap& map, uint64_t* barrier,
                     const std::array<int, 4>& first) {
  uint32_t row = 0;
  for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
    for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
      for (uint32_t i1 = 0; i1 < map.box[1]; ++i1, ++row) {
        const int64_t at[4] = {0, first[1] + int64_t{i1}, first[2] + int64_t{i2},
                               first[3] + int64_t{i3}};
        const char* source = map.data;
        bool exists = true;
        for (int d = 1; d < 4; ++d) {
          exists &= at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
          source += at[d] * static_cast<int64_t>(map.strides[d]);
        }
        for (uint32_t chunk = 0; chunk < 8; ++chunk) {
          const uint32_t place = target + row * 128 + chunk * 16;
          char* to = smem_pointer(place ^ (place >> 7 & 7) << 4);
          if (exists) {
            std::memcpy(to, source + chunk * 16, 16);
          } else {
            std::memset(to, 0, 16);
          }
        }
      }
    }
  }
  mbarrier_change(barrier, [&](Phase& phase) { phase.bytes -= row * 128; });
}
inline void tma_load_4d(void* destination, const CUtensorMap* map, uint64_t* barrier, uint64_t,
                        int c0, int c1, int c2, int c3) {
  const uint32_t target = smem_address(destination);
  if (target % 128 != 0 || map->box[0] != 64 || c0 != 0) std::abort();
  // The map is on the stack of this thread, which may be gone by then.
  simt::copy_engine.run([=, map = *map] { load_box(target, map, barrier, {c0, c1, c2, c3}); });
}

inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 && valid) std::abort();
  smem<uint4>(destination) = valid ? *static_cast<const uint4*>(source) : uint4{0, 0, 0, 0};
}
template <int kBytes>
void cp_async_small(uint32_t destination, const void* source) {
  std::memcpy(smem_pointer(destination), source, kBytes);
}
inline void cp_async_commit() {}
template <int kPending>
void cp_async_wait() {}
inline void cp_async_wait_all() {}

inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  simt::warp().exchange(simt::lane(), address, [&](const std::vector<uint32_t>& rows) {
    const uint32_t words[4] = {r0, r1, r2, r3};
    for (int m = 0; m < 4; ++m) {
      smem<uint32_t>(rows[8 * m + simt::lane() / 4] + simt::lane() % 4 * 4) = words[m];
    }
    return 0;
  });
}

inline void ldmatrix_x4_trans(uint32_t address, uint32_t (&r)[4]) {
  simt::warp().exchange(simt::lane(), address, [&](const std::vector<uint32_t>& rows) {
    for (int m = 0; m < 4; ++m) {
      const uint32_t* row = &rows[8 * m + simt::lane() % 4 * 2];
      const uint32_t column = simt::lane() / 4 * 2;
      r[m] = smem<uint16_t>(row[0] + column) |
             static_cast<uint32_t>(smem<uint16_t>(row[1] + column)) << 16;
    }
    return 0;
  });
}
inline void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                              uint32_t r3) {
  simt::warp().exchange(simt::lane(), address, [&](const std::vector<uint32_t>& rows) {
    const uint32_t words[4] = {r0, r1, r2, r3};
    for (int m = 0; m < 4; ++m) {
      const uint32_t* row = &rows[8 * m + simt::lane() % 4 * 2];
      const uint32_t column = simt::lane() / 4 * 2;
      smem<uint16_t>(row[0] + column) = static_cast<uint16_t>(words[m]);
      smem<uint16_t>(row[1] + column) = static_cast<uint16_t>(words[m] >> 16);
    }
    return 0;
  });
}

// ---------------------------------------------------------------------------------------------
// Arithmetic

inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1 / x; }

inline float e4m3_value(uint32_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float x = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  if ((code & 0x7f) == 0x7f) x = NAN;
  return code & 0x80 ? -x : x;
}
inline void e4m3_to_f16(uint32_t codes, uint32_t& lo, uint32_t& hi) {
  const auto half = [&](int i) -> uint32_t {
    const float x = e4m3_value(codes >> 8 * i & 0xff);
    return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  };
  lo = half(0) | half(1) << 16;
  hi = half(2) | half(3) << 16;
}
inline uint32_t e4m3_code(float x) {
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return sign | 0x7f;
  const float magnitude = min(std::fabs(x), 448.f);
  // A step of the last bit, which is 2^-9 for the least ones; nearbyint rounds to even.
  const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return sign | static_cast<uint32_t>((exponent + 6) * 8 + steps);
}
inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return e4m3_code(x0) | e4m3_code(x1) << 8 | e4m3_code(x2) << 16 | e4m3_code(x3) << 24;
}
inline uint32_t top_bit_of_byte(uint32_t x, int i) { return x >> (8 * i + 7) & 1 ? ~0u : 0u; }

}  // namespace flashmla::ptx
