// SPDX-License-Identifier: Apache-2.0
// The micro-kernel: a small tile of the output stays in registers while the depth runs by.
#pragma once

#include <cstring>

#include "path.h"

namespace codebook {
namespace {

// Rows x (kVectors * kLanes) outputs in vector registers. The compiler's vector type is the register of whatever
// instruction set the including file is compiled for, and products are fused into the sums where it has that.
template <int kLanes, int kVectors, int kRows>
struct VectorTile {
  static constexpr std::int64_t rows = kRows;
  static constexpr std::int64_t columns = kLanes * kVectors;

  typedef float V __attribute__((vector_size(kLanes * sizeof(float))));

  // c [n, columns] += a [n, depth] b [depth, columns], each output summed in the order of the depth.
  template <int n>
  static void add(const float* a, std::int64_t a_pitch, const float* b, std::int64_t depth, float* c,
                  std::int64_t c_pitch) {
    V sum[n][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) std::memcpy(&sum[r][v], c + r * c_pitch + v * kLanes, sizeof(V));
    for (std::int64_t k = 0; k < depth; ++k, b += columns) {
      V right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) std::memcpy(&right[v], b + v * kLanes, sizeof(V));
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) {
        const V left = a[r * a_pitch + k] - V{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) std::memcpy(c + r * c_pitch + v * kLanes, &sum[r][v], sizeof(V));
  }
};

// Plain loops: the reference that the others are held against.
struct ScalarTile {
  static constexpr std::int64_t rows = 4;
  static constexpr std::int64_t columns = 8;

  template <int n>
  static void add(const float* a, std::int64_t a_pitch, const float* b, std::int64_t depth, float* c,
                  std::int64_t c_pitch) {
    for (std::int64_t k = 0; k < depth; ++k, b += columns)
      for (int r = 0; r < n; ++r)
        for (int j = 0; j < columns; ++j) c[r * c_pitch + j] = c[r * c_pitch + j] + a[r * a_pitch + k] * b[j];
  }
};

template <class Tile, int n>
void add_rows(std::int64_t rows, const float* a, std::int64_t a_pitch, const float* b, std::int64_t depth, float* c,
              std::int64_t c_pitch) {
  if constexpr (n > 1) {
    if (rows < n) return add_rows<Tile, n - 1>(rows, a, a_pitch, b, depth, c, c_pitch);
  }
  Tile::template add<n>(a, a_pitch, b, depth, c, c_pitch);
}

// c [rows, columns] += a [rows, depth] b [depth, columns], rows <= Tile::rows and columns <= Tile::columns; b is stored
// with Tile::columns columns whatever `columns` says.
template <class Tile>
void add_tile(std::int64_t rows, std::int64_t columns, const float* a, std::int64_t a_pitch, const float* b,
              std::int64_t depth, float* c, std::int64_t c_pitch) {
  if (columns == Tile::columns) return add_rows<Tile, Tile::rows>(rows, a, a_pitch, b, depth, c, c_pitch);
  float edge[Tile::rows * Tile::columns] = {};
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < columns; ++j) edge[r * Tile::columns + j] = c[r * c_pitch + j];
  add_rows<Tile, Tile::rows>(rows, a, a_pitch, b, depth, edge, Tile::columns);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < columns; ++j) c[r * c_pitch + j] = edge[r * Tile::columns + j];
}

}  // namespace
}  // namespace codebook
