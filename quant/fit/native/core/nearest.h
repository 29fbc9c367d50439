// SPDX-License-Identifier: Apache-2.0
// Index of the entry of least offset[entry] + Σ pulls[i] * features[i][entry] for each point, the first of equals.
#pragma once

#include <limits>

#include "lanes.h"

namespace vqdm {
namespace {

// `pulls` [count, width]; `features` [width + 1, entries], the last line of which is the offset, infinite for entries
// that are there to make them a multiple of kEntryStep.
template <class L>
void nearest_entries(const float* pulls, std::int64_t count, std::int64_t width, const float* features,
                     std::int64_t entries, std::uint8_t* codes) {
  using Vector = typename L::Vector;
  constexpr std::int64_t kGroup = L::kRows, kStep = L::kWidth;
  Buffer<float> sums(kGroup * entries);
  for (std::int64_t first = 0; first < count; first += kGroup) {
    const std::int64_t points = count - first < kGroup ? count - first : kGroup;
    Vector least[kGroup];
    for (auto& each : least) each = L::splat(std::numeric_limits<float>::infinity());
    for (std::int64_t entry = 0; entry < entries; entry += kStep) {
      Vector sum[kGroup];
      for (auto& each : sum) each = L::load(features + width * entries + entry);
      for (std::int64_t i = 0; i < width; ++i) {
        const Vector feature = L::load(features + i * entries + entry);
        for (std::int64_t n = 0; n < kGroup; ++n)
          sum[n] += feature * pulls[(first + (n < points ? n : 0)) * width + i];
      }
      for (std::int64_t n = 0; n < kGroup; ++n) {
        L::store(sums.data() + n * entries + entry, sum[n]);
        least[n] = L::least(sum[n], least[n]);
      }
    }
    for (std::int64_t n = 0; n < points; ++n) {
      const float lowest = L::smallest(least[n]);
      std::uint8_t code = 0;
      for (std::int64_t entry = 0; entry < entries; entry += kStep)
        if (const std::uint32_t bits = L::up_to(L::load(sums.data() + n * entries + entry), lowest)) {
          code = static_cast<std::uint8_t>(entry + __builtin_ctz(bits));
          break;
        }
      codes[first + n] = code;
    }
  }
}

}  // namespace
}  // namespace vqdm
