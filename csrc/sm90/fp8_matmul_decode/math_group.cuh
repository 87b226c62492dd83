// The math warpgroups of decode with FP8 products.
#pragma once

#include "sm90/decode/bfloat16_rows.cuh"
#include "sm90/fp8_matmul_decode/storage.cuh"

namespace flashmla::sm90::fp8_matmul_decode {

// Two e4m3 values of a pair of fp16.
__device__ __forceinline__ uint32_t to_e4m3(__half2 x) {
  return ptx::f16_to_e4m3(reinterpret_cast<const uint32_t&>(x));
}

template <typename P>
class MathGroup {
  using T = typename P::T;

 public:
  // `group`: 0 has the scores of even blocks and the left half of the output columns, 1 the others.
  // Not a template parameter: both run the same code, or it would not fit into the instruction
  // cache.
  __device__ MathGroup(const KernelParams<P>& kp, SharedStorage<P>& smem, int group)
      : kp_(kp), base_(ptx::smem_address(&smem)), group_(group) {
    thread_ = threadIdx.x % 128;
  }

  __device__ __forceinline__ void run() {
    auto& smem = fresh_smem();
    const auto barrier = [&] { barrier_of_group(); };
    smem.pieces[group_].for_each(kp_, smem.place.part, thread_, barrier, [&](auto& piece) {
      if (piece.first_block >= piece.end_block) {
        store_empty(kp_, fresh_smem().place, piece, group_, thread_);
        return;
      }
      begin_piece(piece);
      attend(piece);
      finish_piece(piece);
    });
  }

 private:
  // Not kept: registers are scarce.
  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  // This thread's first row of the tile.
  __device__ __forceinline__ int row() const { return thread_ / 32 * 16 + thread_ % 32 / 4; }

  __device__ __forceinline__ uint32_t keys_parity() const { return parities_ & 1; }
  __device__ __forceinline__ uint32_t pair_parity() const { return parities_ >> 1 & 1; }
  __device__ __forceinline__ uint32_t piece_parity() const { return parities_ >> 2; }

  __device__ __forceinline__ void barrier_of_group() const {
    ptx::named_barrier_sync(kBarrierMathGroup + group_, 128);
  }

  // --- blocks -----------------------------------------------------------------------------------

  // By pairs of blocks: scores and weights of the own one, then the values of both.
  __device__ __forceinline__ void attend(const schedule::Piece& piece) {
#pragma unroll 1
    for (int block = piece.first_block; block < piece.end_block; block += 2) {
      const int blocks = min(piece.end_block - block, 2);
      bool moved = false;
      if (group_ < blocks) {
        float s[32];
        scores(s);
        mask(piece, block + group_, s);
        moved = move_max(s);
        exponentials_to_shared(s);
      } else {
        publish_max(max_);
        no_weights();
      }
      values(blocks, moved);
      parities_ ^= 2;
    }
  }

  // Shared memory by an address that the compiler does not know to be the same each time: it would
  // keep dozens of addresses and descriptors in registers, or worse, out of them.
  __device__ __forceinline__ SharedStorage<P>& fresh_smem() const {
    return *reinterpret_cast<SharedStorage<P>*>(ptx::smem_pointer(ptx::opaque(base_)));
  }

  // --- scores -----------------------------------------------------------------------------------

  // S = Q K^T of this warpgroup's block: RoPE columns, then group by group, each times the scales
  // of its tokens. The products of half of the tokens run while those of the other half are added.
  __device__ __forceinline__ void scores(float (&s)[32]) {
    auto& smem = fresh_smem();
    ptx::mbarrier_wait(&smem.keys_full[group_], keys_parity());
    parities_ ^= 1;
    marks_ = smem.marks[group_];
    float t[2][16];
    wgmma::fence();
    {
      const uint64_t a = wgmma::k_major(ptx::smem_address(smem.q_rope), kGroupBytes);
      const uint64_t b = wgmma::k_major(ptx::smem_address(smem.rope[group_]), kGroupBytes);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t offset = wgmma::distance(step * 32);
        wgmma::m64n64k16_ss(T{}, s, a + offset, b + offset, step > 0);
      }
    }
    issue_scores(smem, 0, 0, t[0]);
    issue_scores(smem, 0, 1, t[1]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool last = group == kGroups - 1 && half == 1;
        const Scales scales = read_scales(smem, group, half);
        if (last) {
          wgmma::wait<0>();
        } else {
          wgmma::wait<1>();
        }
        if (group == 0 && half == 0) wgmma::hold(s);
        wgmma::hold(t[half]);
        if (last) ptx::mbarrier_arrive(&smem.keys_empty[group_]);
        add_scaled(scales, t[half], half, s);
        if (group + 1 < kGroups) {
          wgmma::fence();
          issue_scores(smem, group + 1, half, t[half]);
        }
      }
    }
    if (!P::kSparse && marks_.x != 0) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = NAN;
      wgmma::hold(s);
    }
  }

  // Of half of the tokens.
  __device__ __forceinline__ void issue_scores(SharedStorage<P>& smem, int group, int half,
                                               float (&t)[16]) const {
    const uint64_t a = wgmma::k_major(ptx::smem_address(smem.q[group]), kGroupBytes);
    const uint64_t b = wgmma::k_major(
        ptx::smem_address(smem.codes[group_][group]) + half * kCodeTileBytes / 2, kGroupBytes);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t offset = wgmma::distance(step * 32);
      wgmma::m64n32k32_e4m3_ss(t, a + offset, b + offset, step > 0);
    }
    wgmma::commit();
  }

  // Scales of this thread's columns of half of the scores.
  struct Scales {
    uint2 pairs[4];
  };
  __device__ __forceinline__ Scales read_scales(SharedStorage<P>& smem, int group, int half) const {
    const uint32_t address = ptx::smem_address(&smem.scales[group_][group][half * kTokens / 2]) +
                             lane() % 4 * sizeof(float2);
    Scales scales;
#pragma unroll
    for (int j = 0; j < 4; ++j) scales.pairs[j] = ptx::ld_shared_8(address + j * 8 * sizeof(float));
    return scales;
  }

  __device__ __forceinline__ static void add_scaled(const Scales& scales, const float (&t)[16],
                                                    int half, float (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint2 pair = scales.pairs[i / 4];
      const float scale = __uint_as_float(i % 2 == 0 ? pair.x : pair.y);
      s[16 * half + i] = fmaf(t[i], scale, s[16 * half + i]);
    }
  }

  // --- softmax ----------------------------------------------------------------------------------

  __device__ __forceinline__ void mask(const schedule::Piece& piece, int block, float (&s)[32]) {
    if (!(kp_.p.softmax_scale > 0.f)) [[unlikely]] {
      // The largest score must become the largest exponent.
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] *= row_scale_[i / 2 % 2];
      wgmma::hold(s);
    }
    if constexpr (P::kSparse) {
      if ((marks_.x & marks_.y) == 0xffffffff) [[likely]]
        return;
      const int first = lane() % 4 * 2;
      const uint32_t exist[2] = {marks_.x >> first, marks_.y >> first};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (!(exist[i / 16] >> (i / 4 % 4 * 8 + i % 2) & 1)) s[i] = -INFINITY;
      }
      wgmma::hold(s);
    } else if (const int first_row = fresh_smem().place.row_tile * kRows;
               (block + 1) * kTokens > visible_tokens(kp_, piece, first_row)) [[unlikely]] {
      const int visible[2] = {visible_tokens(kp_, piece, first_row + row()),
                              visible_tokens(kp_, piece, first_row + row() + 8)};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = block * kTokens + i / 4 * 8 + lane() % 4 * 2 + i % 2;
        if (token >= visible[i / 2 % 2]) s[i] = -INFINITY;
      }
      wgmma::hold(s);
    }
  }

  __device__ __forceinline__ float multiplier(int h) const {
    return kp_.p.softmax_scale > 0.f ? row_scale_[h] : 1.f;
  }

  // Weights are at most 2^kHeadroom when the maximum has just been moved, and 2^kSlack before it is
  // moved again: e4m3 has its last bit at 2^-9 and ends at 448.
  static constexpr float kHeadroom = 4.f;
  static constexpr float kSlack = 8.f;

  // Moves the running maximum on if need be and publishes it. Returns whether one of the
  // warp's moved.
  __device__ __forceinline__ bool move_max(const float (&s)[32]) {
    float block_max[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        m[k] = fmaxf(fmaxf(s[8 * k + 2 * h], s[8 * k + 2 * h + 1]),
                     fmaxf(s[8 * k + 2 * h + 4], s[8 * k + 2 * h + 5]));
      }
      block_max[h] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3])) * multiplier(h);
    }
    const bool moved =
        __any_sync(0xffffffff, block_max[0] > max_[0] + kSlack || block_max[1] > max_[1] + kSlack);
    if (moved) [[unlikely]] {
      auto& smem = fresh_smem();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int distance = 1; distance <= 2; distance *= 2) {
          block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(0xffffffff, block_max[h], distance));
        }
        // In shared memory, since it waits there for the maximum of the other warpgroup.
        if (lane() % 4 == 0) smem.max_before[group_][row() + 8 * h] = max_[h];
        if (block_max[h] > max_[h] + kSlack) set_max(h, block_max[h] - kHeadroom);
      }
      __syncwarp();
    }
    publish_max(max_);
    return moved;
  }

  __device__ __forceinline__ void publish_max(const float (&max)[2]) const {
    auto& smem = fresh_smem();
    if (lane() % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) smem.row_max[pair_parity()][group_][row() + 8 * h] = max[h];
    }
  }

  // Turns s into P, sums up, and stores P, rounded to fp16, for both warpgroups: a thread of either
  // reads what the same thread of the other has written.
  __device__ __forceinline__ void exponentials_to_shared(float (&s)[32]) {
    auto& smem = fresh_smem();
    const float scale[2] = {multiplier(0), multiplier(1)};
    const float offset[2] = {finite_max(max_[0]), finite_max(max_[1])};
    const uint32_t address = ptx::smem_address(smem.p[pair_parity()][group_][0]) + thread_ * 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t p[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int h = r % 2;
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = ptx::exp2_approx(fmaf(s[8 * k + 2 * r + e], scale[h], -offset[h]));
          sum_[h] += x[e];
        }
        p[r] = ptx::pack<__half>(x[0], x[1]);
      }
      ptx::st_shared_16(address + k * sizeof(smem.p[0][0][0]), p[0], p[1], p[2], p[3]);
    }
  }

  // P of a block that is not there.
  __device__ __forceinline__ void no_weights() const {
    auto& smem = fresh_smem();
#pragma unroll
    for (int k = 0; k < 4; ++k) smem.p[pair_parity()][group_][k][thread_] = uint4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void set_max(int h, float new_max) {
    sum_[h] *= ratio(max_[h], new_max);
    max_[h] = new_max;
  }

  // What turns weights below one maximum into weights below another.
  __device__ __forceinline__ static float ratio(float old_max, float new_max) {
    return old_max == new_max ? 1.f : ptx::exp2_approx(old_max - finite_max(new_max));
  }

  // --- values -----------------------------------------------------------------------------------

  // Adds P V of a pair, or of a single block, for the two groups of columns of this warpgroup: P
  // times the scales of the tokens is what is multiplied with the codes.
  __device__ __forceinline__ void values(int blocks, bool moved) {
    auto& smem = fresh_smem();
    ptx::mbarrier_arrive(&smem.p_full);
    ptx::mbarrier_wait(&smem.p_full, pair_parity());
    const float* others = smem.row_max[pair_parity()][1 - group_];
    const float other[2] = {others[row()], others[row() + 8]};
    const bool own_moved = moved;
    moved |= __any_sync(0xffffffff, other[0] != max_[0] || other[1] != max_[1]);
    // What P of each block, and of its rows, is still to be multiplied with.
    __half2 late[kBuffers] = {__float2half2_rn(1.f), __float2half2_rn(1.f)};
    if (moved) [[unlikely]] {
      follow_max(other, own_moved, late);
    }
    ptx::mbarrier_wait(&smem.values_full, pair_parity());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[kBuffers][2][4];
      weights(smem, i, late, a);
      const float reference = smem.reference[2 * group_ + i];
      float t[2][32];
      wgmma::fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t tile = 4 * group_ + 2 * i + half;
#pragma unroll
        for (int block = 0; block < kBuffers; ++block) {
          // A block that is not there has weight 0, and what is read instead must not be NaN.
          const uint64_t b =
              wgmma::k_major_64b(ptx::smem_address(smem.values[block < blocks ? block : 0][tile]));
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            wgmma::m64n64k32_e4m3_rs(t[half], a[block][step], b + wgmma::distance(32 * step),
                                     block + step > 0);
          }
        }
        wgmma::commit();
      }
      wgmma::wait<1>();
      wgmma::hold(t[0]);
      add(t[0], reference, 64 * i);
      wgmma::wait<0>();
      wgmma::hold(t[1]);
      if (i == 1) ptx::mbarrier_arrive(&smem.values_empty);
      add(t[1], reference, 64 * i + 32);
    }
  }

  // Makes the larger of this warpgroup's and the other's maximum that of both.
  __device__ __forceinline__ void follow_max(const float (&other)[2], bool own_moved,
                                             __half2 (&late)[kBuffers]) {
    auto& smem = fresh_smem();
    float rescale[2], own_late[2], other_late[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float own = max_[h];
      const float new_max = fmaxf(own, other[h]);
      own_late[h] = ratio(own, new_max);
      other_late[h] = ratio(other[h], new_max);
      sum_[h] *= own_late[h];
      max_[h] = new_max;
      rescale[h] = ratio(own_moved ? smem.max_before[group_][row() + 8 * h] : own, new_max);
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) out_[i] *= rescale[i / 2 % 2];
    const __half2 own_pair = __floats2half2_rn(own_late[0], own_late[1]);
    const __half2 other_pair = __floats2half2_rn(other_late[0], other_late[1]);
    late[0] = group_ == 0 ? own_pair : other_pair;
    late[1] = group_ == 0 ? other_pair : own_pair;
  }

  // Weights of the tokens of a pair for group i of this warpgroup, as the products take them. A
  // thread's two columns of two neighbouring score tiles are four tokens side by side.
  __device__ __forceinline__ void weights(SharedStorage<P>& smem, int i,
                                          const __half2 (&late)[kBuffers],
                                          uint32_t (&a)[kBuffers][2][4]) const {
#pragma unroll
    for (int block = 0; block < kBuffers; ++block) {
      const uint32_t p_address = ptx::smem_address(smem.p[pair_parity()][block][0]) + thread_ * 16;
      const uint32_t scales =
          ptx::smem_address(smem.relative_scales[block][2 * group_ + i]) + lane() % 4 * 4;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint4 bits = ptx::ld_shared_16(p_address + k * sizeof(smem.p[0][0][0]));
        const uint32_t p[4] = {bits.x, bits.y, bits.z, bits.w};
        uint32_t codes[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t scale = ptx::ld_shared_4(scales + (2 * k + r / 2) * 16);
          const __half2 factor = r % 2 == 0 ? __low2half2(late[block]) : __high2half2(late[block]);
          const __half2 w = __hmul2(reinterpret_cast<const __half2&>(p[r]), factor);
          codes[r] = to_e4m3(__hmul2(w, reinterpret_cast<const __half2&>(scale)));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[block][k / 2][k % 2 * 2 + h] = __byte_perm(codes[h], codes[2 + h], 0x5410);
        }
      }
    }
  }

  __device__ __forceinline__ void add(const float (&t)[32], float reference, int first) {
#pragma unroll
    for (int i = 0; i < 32; ++i) out_[first + i] = fmaf(t[i], reference, out_[first + i]);
  }

  // --- piece ------------------------------------------------------------------------------------

  __device__ __forceinline__ void begin_piece(const schedule::Piece& piece) {
    constexpr float kLog2e = 1.4426950408889634f;
    auto& smem = fresh_smem();
    prepare_queries(piece);
#pragma unroll
    for (int i = 0; i < 128; ++i) out_[i] = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max_[h] = -INFINITY;
      sum_[h] = 0.f;
      row_scale_[h] = kp_.p.softmax_scale * kLog2e * smem.q_factor[row() + 8 * h];
    }
  }

  // Writes the row tile: latent columns as e4m3, scaled so that the largest of a row lies in [128,
  // 256), and RoPE columns scaled likewise. A warp has every eighth row. Nobody reads the row tile
  // before: both warpgroups have met at the end of the last piece.
  __device__ __forceinline__ void prepare_queries(const schedule::Piece& piece) {
    auto& smem = fresh_smem();
    constexpr int kWarps = kMathThreads / 32;
    constexpr int kRowsAtOnce = 4;
    const int64_t first_row =
        (static_cast<int64_t>(piece.request) * kp_.p.slices + smem.place.slice) * kp_.rows;
    const int warp = group_ * 4 + thread_ / 32;
#pragma unroll 1
    for (int begin = warp; begin < kRows; begin += kWarps * kRowsAtOnce) {
      uint4 latent[kRowsAtOnce][2], rope[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = smem.place.row_tile * kRows + begin + i * kWarps;
        const uint4 zero = {0, 0, 0, 0};
        const auto* source = reinterpret_cast<const uint4*>(static_cast<const T*>(kp_.p.q) +
                                                            (first_row + row) * 576);
        const bool exists = row < kp_.rows;
        latent[i][0] = exists ? source[lane()] : zero;
        latent[i][1] = exists ? source[32 + lane()] : zero;
        rope[i] = exists && lane() < 8 ? source[64 + lane()] : zero;
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = begin + i * kWarps;
        const uint32_t latent_max =
            __reduce_max_sync(0xffffffff, max(largest(latent[i][0]), largest(latent[i][1])));
        const uint32_t rope_max = __reduce_max_sync(0xffffffff, largest(rope[i]));
        // Exponents of float32. RoPE columns that are 2^64 times as large count too, lest they
        // become infinite.
        const int exponent =
            max(max(static_cast<int>(latent_max >> 7), static_cast<int>(rope_max >> 7) - 64), 8);
        const float scale = __uint_as_float((261 - exponent) << 23);
        if (lane() == 0) {
          smem.q_factor[row] =
              max(latent_max, rope_max) >= 0x7f80 ? NAN : __uint_as_float((exponent - 7) << 23);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          store_codes(latent[i][part], scale, row, 32 * part + lane());
        }
        if (lane() < 8) {
          const uint4 x = rope[i];
          ptx::st_shared_16(
              ptx::smem_address(smem.q_rope) + row * kRowBytes + ((lane() ^ (row & 7)) << 4),
              scaled_pair<T>(x.x, scale), scaled_pair<T>(x.y, scale), scaled_pair<T>(x.z, scale),
              scaled_pair<T>(x.w, scale));
        }
      }
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kBarrierQueries, kMathThreads);
  }

  // Stores eight latent columns, those of chunk `chunk`, of a row.
  __device__ __forceinline__ void store_codes(const uint4& x, float scale, int row, int chunk) {
    auto& smem = fresh_smem();
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A bfloat16 has eight bits, so fp16 holds it but for tiny ones.
      const float2 pair = unpacked(pairs[i]);
      codes[i] = to_e4m3(__floats2half2_rn(pair.x * scale, pair.y * scale));
    }
    const uint32_t place = chunk / 16 * kCodeTileBytes + row * kGroupColumns +
                           ((chunk / 2 % 8 ^ (row & 7)) << 4) + chunk % 2 * 8;
    *reinterpret_cast<uint2*>(smem.q[0] + place) = {__byte_perm(codes[0], codes[1], 0x5410),
                                                    __byte_perm(codes[2], codes[3], 0x5410)};
  }

  __device__ __forceinline__ void finish_piece(const schedule::Piece& piece) {
    auto& smem = fresh_smem();
    float (&sums)[kMathGroups][kRows] = smem.row_sum[piece_parity()];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum_[h] += __shfl_xor_sync(0xffffffff, sum_[h], 1);
      sum_[h] += __shfl_xor_sync(0xffffffff, sum_[h], 2);
      if (lane() % 4 == 0) sums[group_][row() + 8 * h] = sum_[h];
    }
    ptx::mbarrier_arrive(&smem.sums_full);
    ptx::mbarrier_wait(&smem.sums_full, piece_parity());
    parities_ ^= 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int tile_row = row() + 8 * h;
      const int row = smem.place.row_tile * kRows + tile_row;
      if (row >= kp_.rows) continue;
      // Both warpgroups add in the same order, so both get the same bits.
      const float sum = sums[0][tile_row] + sums[1][tile_row];
      if (piece.slot >= 0) {
        store_partial(piece, h, sum);
      } else {
        store_final(piece, row, h, sum);
      }
    }
  }

  // Four columns side by side of 16: the even ones of a thread are in one accumulator tile, the odd
  // ones in the next. Calls store(column in the warpgroup's half, four values).
  template <typename Store>
  __device__ __forceinline__ void for_columns(int h, const Store& store) const {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const int even = 8 * c + 2 * h;
      store(16 * c + lane() % 4 * 4,
            float4{out_[even], out_[even + 4], out_[even + 1], out_[even + 5]});
    }
  }

  __device__ __forceinline__ void store_final(const schedule::Piece& piece, int row, int h,
                                              float sum) {
    const RowIndex index = row_index(kp_, fresh_smem().place.slice, row);
    const auto [lse, factor] = final_row(kp_.p, piece.request, index.head, max_[h], sum);
    T* out = static_cast<T*>(kp_.p.out) + out_row(kp_, piece.request, index) * 512 + group_ * 256;
    for_columns(h, [&](int column, const float4& x) {
      *reinterpret_cast<uint2*>(out + column) = {ptx::pack<T>(x.x * factor, x.y * factor),
                                                 ptx::pack<T>(x.z * factor, x.w * factor)};
    });
    if (group_ == 0 && lane() % 4 == 0) kp_.p.lse[lse_index(kp_, piece.request, index)] = lse;
  }

  // A thread's four columns are those of two lanes in the order of the workspace, in one tile of 8
  // columns or in the next. Pairs as integers, since as float2 they make the compiler spill.
  __device__ __forceinline__ void store_partial(const schedule::Piece& piece, int h, float sum) {
    constexpr int kTiles = 256 / partial::kTileColumns;
    const int64_t slab = partial_slab(kp_, fresh_smem().place, piece, thread_ / 32);
    const int q = lane() % 4;
    uint64_t* out =
        reinterpret_cast<uint64_t*>(kp_.p.partial_out) + slab * (partial::values(512) / 2) +
        2 * ((group_ * kTiles + q / 2) * partial::kLanes + lane() / 4 * 4 + q % 2 * 2) + h;
    const auto pair = [](float lo, float hi) {
      return __float_as_uint(lo) | static_cast<uint64_t>(__float_as_uint(hi)) << 32;
    };
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const int even = 8 * c + 2 * h;
      out[4 * c * partial::kLanes] = pair(out_[even], out_[even + 4]);
      out[4 * c * partial::kLanes + 2] = pair(out_[even + 1], out_[even + 5]);
    }
    if (group_ == 0 && q == 0) store_partial_sums(kp_, slab, lane() / 4, h, {max_[h], sum});
  }

  static constexpr int kBarrierQueries = 3;

  const KernelParams<P>& kp_;
  uint32_t base_;  // of shared memory
  int group_;
  int thread_;

  uint2 marks_;
  float out_[128];
  float max_[2];  // base-2 scaled, less kHeadroom; -inf while nothing was attended
  float sum_[2];
  float row_scale_[2];
  uint32_t parities_ = 0;  // of keys, pairs and pieces, a bit each
};

}  // namespace flashmla::sm90::fp8_matmul_decode
