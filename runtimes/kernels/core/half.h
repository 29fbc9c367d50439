// SPDX-License-Identifier: Apache-2.0
// IEEE half precision to single precision, exact, without hardware for it. Static: files of several instruction sets
// include it, and the linker must not pick one of their copies for all.
#pragma once

#include <cstdint>
#include <cstring>

namespace codebook {

// The value of the half-precision float with these bits; NaNs stay NaNs.
static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  float value;
  if (rest < 0x0400u) {  // zero and subnormal: rest * 2^-24
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
  } else {
    const std::uint32_t rebias = rest >= 0x7c00u ? 0x70000000u : 0x38000000u;  // 112 or 224 exponents up
    const std::uint32_t bits = (rest << 13) + rebias;
    std::memcpy(&value, &bits, sizeof value);
  }
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace codebook
