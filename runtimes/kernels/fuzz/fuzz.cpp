// SPDX-License-Identifier: Apache-2.0
// fuzz RUNS [SEED]: hostile and honest layers through the core, built under sanitizers. Arrays lie on the heap in
// exactly their sizes, so that AddressSanitizer sees every step outside them; what the core accepts must equal a plain
// double loop. Prints how many layers ran and how many were refused; any fault ends the process with a code other than
// 0.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "codebook.h"

namespace {

using codebook::Array;
using codebook::Status;

std::mt19937_64 random_bits;

std::int64_t between(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}
bool once_in(int n) { return between(1, n) == 1; }

// Sizes that break arithmetic: zero, negative, powers of two and their neighbours.
std::int64_t hostile() { return (once_in(2) ? 1 : -1) * ((std::int64_t{1} << between(0, 62)) + between(-1, 1)); }

constexpr double kMaxElements = 1 << 16;

double product(const std::vector<std::int64_t>& shape) {
  double all = 1;
  for (const std::int64_t size : shape) all *= std::max<double>(0, static_cast<double>(size));
  return all;
}

template <class T>
struct Memory {
  std::vector<std::int64_t> shape;
  std::unique_ptr<T[]> data;

  explicit Memory(std::vector<std::int64_t> shape_) : shape(std::move(shape_)) {
    data.reset(new T[small() ? static_cast<std::size_t>(product(shape)) : 1]);
  }
  bool small() const { return product(shape) <= kMaxElements; }
  Array<T> array() const { return {data.get(), shape.data(), shape.size()}; }
};

void require(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

struct Layer {
  Memory<std::uint8_t> codes;
  Memory<std::uint16_t> codebooks, scale;
  Memory<float> bias;
  bool with_bias;

  Status check(codebook::Weights* weights) const {
    return codebook::check_weights(codes.array(), codebooks.array(), scale.array(),
                                   with_bias ? bias.array() : Array<float>{}, weights);
  }
};

std::uint16_t finite_half() { return static_cast<std::uint16_t>((random_bits() & 0x8fffu) | 0x3000u); }  // 0.1 to 1

Layer make_layer(std::int64_t outputs, std::int64_t groups, std::int64_t length) {
  const std::int64_t books = between(1, 8), entries = once_in(2) ? 256 : between(1, 256);
  std::vector<std::int64_t> codes{outputs, groups, books}, books_shape{books, entries, length}, scale{outputs},
      bias{outputs};
  if (once_in(4)) {
    std::vector<std::int64_t>* const victims[] = {&codes, &books_shape, &scale, &bias};
    std::vector<std::int64_t>& victim = *victims[between(0, 3)];
    if (once_in(4)) victim.pop_back();
    else victim[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(victim.size()) - 1))] = hostile();
    if (product(codes) > kMaxElements) books_shape[1] = 256;  // then no code is read, and there need be none
  }
  Layer layer{Memory<std::uint8_t>(codes), Memory<std::uint16_t>(books_shape), Memory<std::uint16_t>(scale),
              Memory<float>(bias), once_in(2)};
  const std::int64_t reach = once_in(8) ? 255 : std::min<std::int64_t>(entries, 256) - 1;
  if (layer.codes.small())
    for (double i = 0; i < product(codes); ++i)
      layer.codes.data[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(between(0, reach));
  if (layer.codebooks.small())
    for (double i = 0; i < product(books_shape); ++i) layer.codebooks.data[static_cast<std::size_t>(i)] = finite_half();
  if (layer.scale.small())
    for (double i = 0; i < product(scale); ++i) layer.scale.data[static_cast<std::size_t>(i)] = finite_half();
  if (layer.bias.small())
    for (double i = 0; i < product(bias); ++i)
      layer.bias.data[static_cast<std::size_t>(i)] = static_cast<float>(between(-9, 9));
  return layer;
}

void run_threads(void*, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}

codebook::Threads some_threads() {
  return once_in(4) ? codebook::Threads{run_threads, nullptr, static_cast<std::size_t>(between(1, 4))}
                    : codebook::Threads{};
}

const codebook::Path* some_path() {
  const codebook::Path* const* paths = codebook::paths();
  std::int64_t count = 0;
  while (paths[count] != nullptr) ++count;
  return paths[between(0, count - 1)];
}

std::unique_ptr<float[]> some_floats(std::int64_t count) {
  std::unique_ptr<float[]> values(new float[static_cast<std::size_t>(count)]);
  for (std::int64_t i = 0; i < count; ++i)
    values[static_cast<std::size_t>(i)] = static_cast<float>(between(-1000, 1000)) / 512.0f;
  return values;
}

// `sum` in doubles of terms that are `size` in all: fp32 sums of up to a few thousand terms stay within 1e-5 of that.
void require_close(float found, double sum, double size) {
  require(std::fabs(found - sum) <= 1e-5 * size + 1e-30, "the result is not the plain loop's");
}

bool fuzz_linear(const Layer& layer) {
  codebook::Weights weights;
  if (!layer.check(&weights).ok()) return false;
  const std::int64_t rows = between(0, 20), columns = once_in(8) ? hostile() : weights.columns();
  if (!codebook::check_linear(weights, once_in(16) ? hostile() : rows, columns).ok()) return false;
  if (static_cast<double>(rows) * std::max(columns, weights.outputs) > kMaxElements || !layer.codes.small())
    return false;
  const auto x = some_floats(rows * columns), y = some_floats(rows * weights.outputs);
  require(codebook::linear(weights, x.get(), rows, columns, y.get(), some_threads(), some_path()).ok(), "refused late");
  std::vector<float> dense(static_cast<std::size_t>(weights.outputs * columns));
  require(codebook::decode(weights, dense.data()).ok(), "decode refused");
  for (std::int64_t i = 0; i < rows * weights.outputs; ++i) {
    const std::int64_t m = i / weights.outputs, n = i % weights.outputs;
    double sum = weights.bias ? weights.bias[n] : 0.0, size = std::fabs(sum);
    for (std::int64_t k = 0; k < columns; ++k) {
      const double term = static_cast<double>(x[static_cast<std::size_t>(m * columns + k)]) *
                          dense[static_cast<std::size_t>(n * columns + k)];
      sum += term, size += std::fabs(term);
    }
    require_close(y[static_cast<std::size_t>(i)], sum, size);
  }
  return true;
}

double conv2d_pixel(const codebook::Conv2d& layer, const codebook::Weights& weights, const float* dense, const float* x,
                    const std::int64_t* x_shape, std::int64_t output, std::int64_t row, std::int64_t column,
                    double* size) {
  double sum = weights.bias ? weights.bias[output] : 0.0;
  *size = std::fabs(sum);
  for (std::int64_t tap = 0; tap < layer.kernel[0] * layer.kernel[1]; ++tap) {
    const std::int64_t h = row * layer.stride[0] - layer.padding[0] + tap / layer.kernel[1] * layer.dilation[0];
    const std::int64_t w = column * layer.stride[1] - layer.padding[1] + tap % layer.kernel[1] * layer.dilation[1];
    if (h < 0 || h >= x_shape[2] || w < 0 || w >= x_shape[3]) continue;
    for (std::int64_t c = 0; c < x_shape[1]; ++c) {
      const double term = static_cast<double>(x[(c * x_shape[2] + h) * x_shape[3] + w]) *
                          dense[output * weights.columns() + tap * x_shape[1] + c];
      sum += term, *size += std::fabs(term);
    }
  }
  return sum;
}

codebook::Conv2d some_geometry() {
  codebook::Conv2d layer;
  for (int axis = 0; axis < 2; ++axis) {
    layer.kernel[axis] = between(1, 3), layer.stride[axis] = between(1, 3), layer.dilation[axis] = between(1, 2);
    layer.padding[axis] = between(0, 3), layer.padding[axis + 2] = between(0, 3);
  }
  return layer;
}

void spoil(codebook::Conv2d* layer, std::int64_t* x_shape) {
  std::int64_t* const victims[] = {layer->kernel,      layer->kernel + 1, layer->stride,  layer->padding,
                                   layer->padding + 3, layer->dilation,   &layer->groups, x_shape,
                                   x_shape + 1,        x_shape + 2,       x_shape + 3};
  *victims[between(0, 10)] = hostile();
}

bool fuzz_conv2d() {
  codebook::Conv2d layer = some_geometry();
  const std::int64_t length = std::int64_t{2} << between(0, 2), channels = length * between(1, 4);
  std::int64_t x_shape[4] = {between(0, 2), channels, between(1, 9), between(1, 24)}, y_shape[4];
  const Layer stored = make_layer(between(1, 40), layer.kernel[0] * layer.kernel[1] * channels / length, length);
  codebook::Weights weights;
  if (!stored.check(&weights).ok()) return false;
  if (once_in(4)) spoil(&layer, x_shape);
  if (!codebook::check_conv2d(weights, layer, x_shape, y_shape).ok()) return false;
  const std::vector<std::int64_t> in(x_shape, x_shape + 4), out(y_shape, y_shape + 4);
  if (product(in) > kMaxElements || product(out) > kMaxElements || !stored.codes.small()) return false;
  const auto x = some_floats(static_cast<std::int64_t>(product(in))),
             y = some_floats(static_cast<std::int64_t>(product(out)));
  require(codebook::conv2d(weights, layer, x.get(), x_shape, y.get(), some_threads(), some_path()).ok(),
          "refused late");
  std::vector<float> dense(static_cast<std::size_t>(weights.outputs * weights.columns()));
  require(codebook::decode(weights, dense.data()).ok(), "decode refused");
  const std::int64_t pixels = y_shape[2] * y_shape[3], image = x_shape[1] * x_shape[2] * x_shape[3];
  for (std::int64_t i = 0; i < x_shape[0] * weights.outputs * pixels; i += between(1, 7)) {
    const std::int64_t b = i / (weights.outputs * pixels), n = i / pixels % weights.outputs, p = i % pixels;
    double size;
    const double sum = conv2d_pixel(layer, weights, dense.data(), x.get() + b * image, x_shape, n, p / y_shape[3],
                                    p % y_shape[3], &size);
    require_close(y[static_cast<std::size_t>(i)], sum, size);
  }
  return true;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2) return std::fprintf(stderr, "usage: fuzz RUNS [SEED]\n"), 2;
  const long runs = std::atol(words[1]);
  random_bits.seed(count > 2 ? std::strtoull(words[2], nullptr, 10) : 0);
  long ran = 0;
  for (long i = 0; i < runs; ++i) {
    const std::int64_t length = once_in(16) ? between(0, 9) : std::int64_t{2} << between(0, 2);
    ran += once_in(2)
               ? fuzz_conv2d()
               : fuzz_linear(make_layer(between(1, 70), between(1, 160 / std::max<std::int64_t>(length, 1)), length));
  }
  std::printf("%ld layers: %ld ran, %ld refused\n", runs, ran, runs - ran);
  return 0;
}
