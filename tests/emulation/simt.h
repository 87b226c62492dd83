// Runs CUDA kernels on the CPU, a thread for a thread: what those of csrc use of CUDA, so that
// sanitizers see them on any machine. Only one CTA runs at a time, with garbage in its shared
// memory. Slow, and no proof of memory order: what the GPU does later (copies, matrix products) is
// done at once, but for copies that are to come late.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
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
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
// All of it in one place, which run_cta fills with garbage.
#define __shared__ static __attribute__((section("shared")))

using std::max;
using std::min;

using std::isnan;

struct float2 {
  float x, y;
};
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
struct __half {
  _Float16 value;
};
struct __half2 {
  _Float16 x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

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

// Grows whenever threads meet, or one arrives somewhere. Relaxed: it must not order what it counts.
inline std::atomic<uint64_t> progress;
inline void note_progress() { progress.fetch_add(1, std::memory_order_relaxed); }

// The copy engine: works at once, but each `period`-th copy (none if 0) is done when nothing else
// goes on any more, the last one asked for first. So blocks come in an order that a GPU has but
// rarely.
class CopyEngine {
 public:
  ~CopyEngine() {
    thread_ = {};
    if (!late_.empty()) std::abort();
  }
  void run(std::function<void()> copy) {
    if (period == 0 || asked_.fetch_add(1, std::memory_order_relaxed) % period != 0) return copy();
    const std::lock_guard lock(mutex_);
    late_.push_back(std::move(copy));
    if (!thread_.joinable()) {
      thread_ = std::jthread([this](const std::stop_token& stop) { serve(stop); });
    }
  }

  unsigned period = 0;

 private:
  void serve(const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const uint64_t before = progress.load(std::memory_order_relaxed);
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (progress.load(std::memory_order_relaxed) != before) continue;
      std::function<void()> copy;
      {
        const std::lock_guard lock(mutex_);
        if (late_.empty()) continue;
        copy = std::move(late_.back());
        late_.pop_back();
      }
      copy();
    }
  }

  std::atomic<unsigned> asked_ = 0;
  std::mutex mutex_;
  std::vector<std::function<void()>> late_;
  std::jthread thread_;
};
inline CopyEngine copy_engine;

// A barrier and a word of each thread.
struct Group {
  explicit Group(int threads) : barrier(threads), words(threads) {}
  std::barrier<> barrier;
  std::vector<uint32_t> words;

  // The words of all threads that are still there, put down by all at once.
  template <typename Read>
  auto exchange(int index, uint32_t word, const Read& read) {
    words[index] = word;
    note_progress();
    barrier.arrive_and_wait();
    auto result = read(words);
    barrier.arrive_and_wait();
    return result;
  }
};

// A named barrier. Of each meeting: whether any thread said true.
struct Named {
  struct Meet {
    Named* named;
    void operator()() noexcept { named->result = named->any.exchange(false); }
  };
  explicit Named(int threads) : barrier(threads, Meet{this}) {}
  bool meet(bool value) {
    if (value) any = true;
    note_progress();
    barrier.arrive_and_wait();
    return result;
  }
  std::atomic<bool> any = false;
  bool result = false;
  std::barrier<Meet> barrier;
};

// Of the size that is the most a kernel may ask for.
constexpr int kDynamicBytes = 227 * 1024;
alignas(1024) inline char dynamic_shared[kDynamicBytes];
inline std::unique_ptr<Named> named_barriers[16];
inline std::mutex named_barriers_mutex;
inline Named& named_barrier(int id, int threads) {
  const std::lock_guard lock(named_barriers_mutex);
  if (!named_barriers[id]) named_barriers[id] = std::make_unique<Named>(threads);
  return *named_barriers[id];
}

inline std::unique_ptr<Group> cta;
inline std::vector<std::unique_ptr<Group>> warps;
inline std::mutex atomics;

inline unsigned lane() { return thread_index.x % 32; }
inline Group& warp() { return *warps[thread_index.x / 32]; }

inline void run_cta(int64_t index, int threads, const std::function<void()>& kernel) {
  std::minstd_rand garbage(static_cast<unsigned>(index) + 1);
  for (char* byte = __start_shared; byte < __stop_shared; ++byte) *byte = garbage() >> 8;
  for (char& byte : dynamic_shared) byte = garbage() >> 8;
  for (auto& barrier : named_barriers) barrier.reset();
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

inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return simt::warp().exchange(simt::lane(), x, [](const std::vector<uint32_t>& words) {
    return *std::max_element(words.begin(), words.end());
  });
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffff; }

// Numbers.
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return max(a >> 16, b >> 16) << 16 | max(a & 0xffff, b & 0xffff);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float2 __half22float2(__half2 x) {
  return {static_cast<float>(x.x), static_cast<float>(x.y)};
}
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half2 __float2half2_rn(float x) {
  return {static_cast<_Float16>(x), static_cast<_Float16>(x)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<_Float16>(x), static_cast<_Float16>(y)};
}
inline __half2 __low2half2(__half2 x) { return {x.x, x.x}; }
inline __half2 __high2half2(__half2 x) { return {x.y, x.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {static_cast<_Float16>(a.x * b.x), static_cast<_Float16>(a.y * b.y)};
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

constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= simt::kDynamicBytes ? cudaSuccess : cudaErrorInvalidValue;
}
