// SPDX-License-Identifier: Apache-2.0
// Vectors of W floats, and the few things that compilers do not write for them by themselves.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vqdm {
// A copy of its own for each instruction set: what the linker merged could run where it must not.
namespace {

// W floats in a register. `kColumns` registers of `kRows` rows of a product are summed at once; `kTogether` hypotheses
// share a load of entries.
template <int W, int Columns, int Rows, int Together>
struct Lanes {
  typedef float Vector __attribute__((vector_size(W * sizeof(float))));
  static constexpr int kWidth = W, kColumns = Columns, kRows = Rows, kTogether = Together;

  static Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }
  static Vector splat(float value) { return value - Vector{}; }
  static Vector least(Vector a, Vector b) { return a < b ? a : b; }

  // A bit for each lane that is not above.
  static std::uint32_t up_to(Vector value, float most) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(most), _CMP_LE_OQ);
#endif
#if defined(__AVX2__)
    if constexpr (W == 8)
      return static_cast<std::uint32_t>(
          _mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_set1_ps(most), _CMP_LE_OQ)));
#endif
    float lanes[W];
    store(lanes, value);
    std::uint32_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits |= static_cast<std::uint32_t>(lanes[lane] <= most) << lane;
    return bits;
  }
  static float smallest(Vector value) {
    float lanes[W];
    store(lanes, value);
    float least = lanes[0];
    for (int lane = 1; lane < W; ++lane) least = lanes[lane] < least ? lanes[lane] : least;
    return least;
  }
};

// As many zeros as asked for.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : size_(size), data_(new T[static_cast<std::size_t>(size)]()) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete[] data_; }

  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  T* data() { return data_; }
  void fill(T value) {
    for (std::int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  void swap(Buffer& other) {
    T* const mine = data_;
    data_ = other.data_;
    other.data_ = mine;
  }

 private:
  const std::int64_t size_;
  T* data_;
};

template <class T>
void copy(const T* from, std::int64_t count, T* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace vqdm
