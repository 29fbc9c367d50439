// SPDX-License-Identifier: Apache-2.0
// Eight decoded rows of W to eight neighbouring columns of a panel.
#pragma once

#include <cstring>

#include "path.h"

namespace codebook {
namespace {

typedef float Eight __attribute__((vector_size(8 * sizeof(float))));

inline Eight low_pairs(Eight a, Eight b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
inline Eight high_pairs(Eight a, Eight b) { return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
inline Eight low_quads(Eight a, Eight b) { return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
inline Eight high_quads(Eight a, Eight b) { return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
inline Eight low_halves(Eight a, Eight b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
inline Eight high_halves(Eight a, Eight b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }

// panel[k * pitch + r] = rows[r * kBlockColumns + k] for r < 8 and k < depth.
inline void transpose_eight(const float* rows, std::int64_t depth, std::int64_t pitch, float* panel) {
  static_assert(kTransposed == 8, "the shuffles below are for eight rows");
  std::int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    Eight row[8], pairs[8], quads[8], column[8];
    for (int r = 0; r < 8; ++r) std::memcpy(&row[r], rows + r * kBlockColumns + k, sizeof(Eight));
    for (int r = 0; r < 8; r += 2) {
      pairs[r] = low_pairs(row[r], row[r + 1]);
      pairs[r + 1] = high_pairs(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      quads[r] = low_quads(pairs[r], pairs[r + 2]);
      quads[r + 1] = high_quads(pairs[r], pairs[r + 2]);
      quads[r + 2] = low_quads(pairs[r + 1], pairs[r + 3]);
      quads[r + 3] = high_quads(pairs[r + 1], pairs[r + 3]);
    }
    for (int r = 0; r < 4; ++r) {
      column[r] = low_halves(quads[r], quads[r + 4]);
      column[r + 4] = high_halves(quads[r], quads[r + 4]);
    }
    for (int c = 0; c < 8; ++c) std::memcpy(panel + (k + c) * pitch, &column[c], sizeof(Eight));
  }
  for (; k < depth; ++k)
    for (int r = 0; r < 8; ++r) panel[k * pitch + r] = rows[r * kBlockColumns + k];
}

}  // namespace
}  // namespace codebook
