// SPDX-License-Identifier: Apache-2.0
// Codes to fp32 weights. Included by every path's file, compiled for its instructions; the bits are the same in all.
#pragma once

#include <cstring>

#include "path.h"

namespace codebook {
namespace {

template <int kLength>
struct Vector {
  typedef float Type __attribute__((vector_size(kLength * sizeof(float))));
};

// row [groups * length] = scale * the sums of the vectors that `codes` [groups, books] name.
template <int kLength>
void decode_vectors(const float* table, const std::uint8_t* codes, std::int64_t groups, std::int64_t books, float scale,
                    float* row) {
  using V = typename Vector<kLength>::Type;
  constexpr std::int64_t kBook = kTableEntries * kLength;
  for (std::int64_t g = 0; g < groups; ++g, codes += books, row += kLength) {
    V sum;
    std::memcpy(&sum, table + codes[0] * kLength, sizeof sum);
    for (std::int64_t m = 1; m < books; ++m) {
      V vector;
      std::memcpy(&vector, table + m * kBook + codes[m] * kLength, sizeof vector);
      sum += vector;
    }
    sum *= scale;
    std::memcpy(row, &sum, sizeof sum);
  }
}

// W[output, columns], with `columns` on borders between vectors.
void decode_row(const Decodable& decodable, float scale, std::int64_t output, Range columns, float* row) {
  const Weights& weights = decodable.weights;
  const std::int64_t first = columns.begin / weights.length, groups = (columns.end - columns.begin) / weights.length;
  const std::uint8_t* codes = weights.codes + (output * weights.groups + first) * weights.books;
  switch (weights.length) {
    case 2: return decode_vectors<2>(decodable.table, codes, groups, weights.books, scale, row);
    case 4: return decode_vectors<4>(decodable.table, codes, groups, weights.books, scale, row);
    default: return decode_vectors<8>(decodable.table, codes, groups, weights.books, scale, row);
  }
}

}  // namespace
}  // namespace codebook
