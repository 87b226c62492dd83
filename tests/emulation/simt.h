// Runs CUDA kernels on the CPU, a thread for a thread: what the kernels of csrc/smxx use of CUDA,
// so that address and undefined-behaviour sanitizers see them on any machine. Only one CTA runs at
// a time, with garbage in its shared memory. Slow, and no proof of memory order.
#pragma once

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All of it in one place, which run_cta fills with garbage.
#define __shared__ static __attribute__((section("shared")))

using std::max;
using std::min;

struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __half {};
struct __nv_bfloat16 {};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported };

extern "C" {
extern char __start_shared[];
extern char __stop_shared[];
}

namespace simt {

struct Dim {
  unsigned x;
};
inline thread_local Dim thread_index;
inline Dim block_index, block_size;

// A barrier and a word of each thread.
struct Group {
  explicit Group(int threads) : barrier(threads), words(threads) {}
  std::barrier<> barrier;
  std::vector<uint32_t> words;

  // The words of all threads that are still there, put down by all at once.
  template <typename Read>
  auto exchange(int index, uint32_t word, const Read& read) {
    words[index] = word;
    barrier.arrive_and_wait();
    auto result = read(words);
    barrier.arrive_and_wait();
    return result;
  }
};
inline std::unique_ptr<Group> cta;
inline std::vector<std::unique_ptr<Group>> warps;
inline std::mutex atomics;

inline unsigned lane() { return thread_index.x % 32; }
inline Group& warp() { return *warps[thread_index.x / 32]; }

inline void run_cta(int64_t index, int threads, const std::function<void()>& kernel) {
  std::minstd_rand garbage(static_cast<unsigned>(index) + 1);
  for (char* byte = __start_shared; byte < __stop_shared; ++byte) *byte = garbage() >> 8;
  block_index.x = static_cast<unsigned>(index);
  block_size.x = threads;
  cta = std::make_unique<Group>(threads);
  warps.clear();
  for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Group>(32));
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      thread_index.x = i;
      kernel();
      cta->words[i] = 0;
      warp().barrier.arrive_and_drop();
      cta->barrier.arrive_and_drop();
    });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size

inline void __syncthreads() { simt::cta->barrier.arrive_and_wait(); }
inline void __syncwarp() { simt::warp().barrier.arrive_and_wait(); }

inline bool __syncthreads_or(bool x) {
  return simt::cta->exchange(threadIdx.x, x, [](const std::vector<uint32_t>& words) {
    bool any = false;
    for (uint32_t word : words) any |= word != 0;
    return any;
  });
}

template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  return simt::warp().exchange(
      simt::lane(), std::bit_cast<uint32_t>(x),
      [&](const std::vector<uint32_t>& words) { return std::bit_cast<T>(words[source & 31]); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x, simt::lane() ^ distance);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned distance) {
  return __shfl_sync(mask, x, simt::lane() < distance ? simt::lane() : simt::lane() - distance);
}

inline unsigned __ballot_sync(unsigned, bool x) {
  return simt::warp().exchange(simt::lane(), x, [](const std::vector<uint32_t>& words) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (words[i] != 0 ? 1u : 0u) << i;
    return bits;
  });
}
inline int __reduce_add_sync(unsigned, int x) {
  return simt::warp().exchange(simt::lane(), x, [](const std::vector<uint32_t>& words) {
    uint32_t sum = 0;
    for (uint32_t word : words) sum += word;
    return static_cast<int>(sum);
  });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int atomicAdd(int* address, int x) {
  const std::lock_guard lock(simt::atomics);
  const int before = *address;
  *address += x;
  return before;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
