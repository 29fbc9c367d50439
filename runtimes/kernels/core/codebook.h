// SPDX-License-Identifier: Apache-2.0
// Linear and Conv2d layers whose weights stay codes and codebooks while they run.
//
// A weight is W[n, g * d + j] = scale[n] * sum over m of codebooks[m, codes[n, g, m], j]. Conv2d weights are the same
// matrix with columns in (kh, kw, I) order, so a vector never straddles taps. Blocks of W are decoded into scratch that
// fits a core's cache and multiplied with all rows (Linear) or pixels (Conv2d) there are; W never exists as a whole.
//
// Files are untrusted: everything here is checked before memory is touched, and refusals are values, not exceptions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace codebook {

enum class Code { kOk = 0, kWrongShape = 1, kWrongCode = 2, kUnsupported = 3, kOutOfMemory = 4 };

// What came of a call; `message` says what was found and what is allowed.
struct Status {
  Code code = Code::kOk;
  char message[240] = "";
  bool ok() const { return code == Code::kOk; }
};

// A dense row-major array of the host: `shape` holds `rank` sizes, and `data` as many elements as their product.
template <class T>
struct Array {
  const T* data = nullptr;
  const std::int64_t* shape = nullptr;
  std::size_t rank = 0;
};

// Weights that `check_weights` let pass. Half-precision floats are their bits.
struct Weights {
  const std::uint8_t* codes;       // [outputs, groups, books]
  const std::uint16_t* codebooks;  // fp16 [books, entries, length]
  const std::uint16_t* scale;      // fp16 [outputs]
  const float* bias;               // [outputs], or null
  std::int64_t outputs, groups, books, entries, length;

  std::int64_t columns() const { return groups * length; }
};

struct Conv2d {
  std::int64_t kernel[2] = {1, 1};         // rows, columns
  std::int64_t stride[2] = {1, 1};         // rows, columns
  std::int64_t padding[4] = {0, 0, 0, 0};  // top, left, bottom, right: zeros
  std::int64_t dilation[2] = {1, 1};       // rows, columns
  std::int64_t groups = 1;                 // others are refused
};

// The host's thread pool: `run` calls task(argument, i) once for every i < count, on whatever threads it likes, and
// returns when all are done. Without `run` everything happens on the calling thread. Results do not depend on it.
struct Threads {
  void (*run)(void* pool, std::size_t count, void (*task)(void* argument, std::size_t index), void* argument) = nullptr;
  void* pool = nullptr;
  std::size_t count = 1;
};

// How the arithmetic is done here: "scalar", "avx2", "avx512" or "neon".
struct Path;
// The paths that this processor can run, the slowest first and ended by null. "scalar" is the reference.
const Path* const* paths();
const char* path_name(const Path* path);

// Fills `weights` from arrays of shapes [outputs, groups, books], [books, entries, length], [outputs] and [outputs]
// (bias.data may be null). Refuses wrong shapes, sizes whose product overflows, and codes that no entry belongs to.
Status check_weights(const Array<std::uint8_t>& codes, const Array<std::uint16_t>& codebooks,
                     const Array<std::uint16_t>& scale, const Array<float>& bias, Weights* weights);

// Fills `y_shape` [B, outputs, H', W'] for `x_shape` [B, I, H, W]. Refuses layers that the weights do not fit.
Status check_conv2d(const Weights& weights, const Conv2d& layer, const std::int64_t x_shape[4],
                    std::int64_t y_shape[4]);

// Checks that `rows` inputs of `columns` values and as many outputs can be counted, and that the weights fit them.
Status check_linear(const Weights& weights, std::int64_t rows, std::int64_t columns);

// y [rows, outputs] = x [rows, columns] Wᵀ + bias. `path` null: the fastest here.
Status linear(const Weights& weights, const float* x, std::int64_t rows, std::int64_t columns, float* y,
              const Threads& threads, const Path* path = nullptr);

// y [B, outputs, H', W'] = Conv2d(x [B, I, H, W]) + bias. `path` null: the fastest here.
Status conv2d(const Weights& weights, const Conv2d& layer, const float* x, const std::int64_t x_shape[4], float* y,
              const Threads& threads, const Path* path = nullptr);

// W [outputs, columns]: sum of the vectors in the order of the books, then times the scale, all in fp32. Every path
// decodes these bits.
Status decode(const Weights& weights, float* dense);

// The most memory that one call holds per thread and once per call, beyond its arguments.
std::size_t scratch_bytes_per_thread();
std::size_t table_bytes(const Weights& weights);

}  // namespace codebook
