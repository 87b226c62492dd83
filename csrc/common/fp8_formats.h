// Sizes of one token in the FP8 cache formats; jax_flashmla/quantization.py describes the bytes.
#pragma once

#include <cstdint>

namespace flashmla::fp8_formats {

constexpr int kRopeBytes = 64 * 2;

// A row: e4m3 latent, float32 scales, bfloat16 RoPE.
struct V32 {
  static constexpr int kLatent = 512;
  static constexpr int kTile = 128;  // columns that share a scale
  static constexpr int kScalesOffset = kLatent;
  static constexpr int kRopeOffset = kScalesOffset + 4 * 4;
  static constexpr int kTokenBytes = kRopeOffset + kRopeBytes;
};
static_assert(V32::kTokenBytes == 656);

// In a page first e4m3 latent and bfloat16 RoPE of all tokens, then e8m0 scales of all.
struct V4 {
  static constexpr int kLatent = 448;
  static constexpr int kTile = 64;
  static constexpr int kRopeOffset = kLatent;
  static constexpr int kTokenBytes = kRopeOffset + kRopeBytes;
  static constexpr int kTokenScaleBytes = 8;  // 7, and one of padding

  // Pages are padded to a multiple of kTokenBytes.
  static constexpr int64_t page_bytes(int64_t page_size) {
    const int64_t bytes = page_size * (kTokenBytes + kTokenScaleBytes);
    return (bytes + kTokenBytes - 1) / kTokenBytes * kTokenBytes;
  }
};

}  // namespace flashmla::fp8_formats
