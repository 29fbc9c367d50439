// SPDX-License-Identifier: Apache-2.0
// What is refused, and why. Sizes come from files: none is multiplied before it is known to be small enough.
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

#include "path.h"

namespace codebook {
namespace {

constexpr std::int64_t kMaxSize = std::int64_t{1} << 31;   // of one dimension
constexpr std::int64_t kMaxCount = std::int64_t{1} << 60;  // of elements: their bytes can still be counted

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
Status refuse(Code code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof status.message, format, arguments);
  va_end(arguments);
  return status;
}

long long number(std::int64_t value) { return static_cast<long long>(value); }

// Returns when the array has `rank` sizes, each at least 1, whose product can be counted.
Status check_shape(const char* name, const void* data, const std::int64_t* shape, std::size_t rank, std::size_t wanted,
                   const char* layout) {
  if (data == nullptr || shape == nullptr) return refuse(Code::kWrongShape, "%s: there is no data", name);
  if (rank != wanted) return refuse(Code::kWrongShape, "%s: the shape has %zu sizes, must be %s", name, rank, layout);
  std::int64_t count = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    if (shape[i] < 1 || shape[i] > kMaxSize)
      return refuse(Code::kWrongShape, "%s: size %zu of %s is %lld, must be from 1 to %lld", name, i, layout,
                    number(shape[i]), number(kMaxSize));
    if (count > kMaxCount / shape[i])
      return refuse(Code::kWrongShape, "%s: the sizes of %s multiply to more than %lld", name, layout,
                    number(kMaxCount));
    count *= shape[i];
  }
  return {};
}

Status check_vector(const char* name, const void* data, const std::int64_t* shape, std::size_t rank,
                    std::int64_t outputs) {
  Status status = check_shape(name, data, shape, rank, 1, "[outputs]");
  if (status.ok() && shape[0] != outputs)
    return refuse(Code::kWrongShape, "%s: has %lld values, codes have %lld outputs", name, number(shape[0]),
                  number(outputs));
  return status;
}

// With fewer than 256 entries a byte can name one that is not there.
Status check_codes(const Weights& weights) {
  if (weights.entries == kTableEntries) return {};
  const std::int64_t count = weights.outputs * weights.groups * weights.books;
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = weights.codes[i] > largest ? weights.codes[i] : largest;
  if (largest < weights.entries) return {};
  return refuse(Code::kWrongCode, "codes: the largest is %d, the codebooks have %lld entries", largest,
                number(weights.entries));
}

bool countable(std::int64_t a, std::int64_t b) { return a == 0 || b <= kMaxCount / a; }

}  // namespace

Status check_weights(const Array<std::uint8_t>& codes, const Array<std::uint16_t>& codebooks,
                     const Array<std::uint16_t>& scale, const Array<float>& bias, Weights* weights) {
  Status status = check_shape("codes", codes.data, codes.shape, codes.rank, 3, "[outputs, groups, books]");
  if (!status.ok()) return status;
  status = check_shape("codebooks", codebooks.data, codebooks.shape, codebooks.rank, 3, "[books, entries, length]");
  if (!status.ok()) return status;
  const std::int64_t outputs = codes.shape[0], groups = codes.shape[1], books = codes.shape[2];
  const std::int64_t entries = codebooks.shape[1], length = codebooks.shape[2];
  if (books > kMaxBooks)
    return refuse(Code::kUnsupported, "codes: %lld books, at most %lld", number(books), number(kMaxBooks));
  if (codebooks.shape[0] != books)
    return refuse(Code::kWrongShape, "codebooks: %lld books, codes have %lld", number(codebooks.shape[0]),
                  number(books));
  if (entries > kTableEntries)
    return refuse(Code::kUnsupported, "codebooks: %lld entries, a code of one byte names at most %lld", number(entries),
                  number(kTableEntries));
  if (length != 2 && length != 4 && length != 8)
    return refuse(Code::kUnsupported, "codebooks: vectors of %lld weights, must be 2, 4 or 8", number(length));
  if (groups > kMaxSize / length || !countable(outputs, groups * length))
    return refuse(Code::kWrongShape, "codes: %lld groups of %lld weights in %lld outputs are too many", number(groups),
                  number(length), number(outputs));
  status = check_vector("scale", scale.data, scale.shape, scale.rank, outputs);
  if (!status.ok()) return status;
  if (bias.data != nullptr) {
    status = check_vector("bias", bias.data, bias.shape, bias.rank, outputs);
    if (!status.ok()) return status;
  }
  *weights = {codes.data, codebooks.data, scale.data, bias.data, outputs, groups, books, entries, length};
  return check_codes(*weights);
}

Status check_linear(const Weights& weights, std::int64_t rows, std::int64_t columns) {
  if (columns != weights.columns())
    return refuse(Code::kWrongShape, "x: rows of %lld values, the weights have %lld columns", number(columns),
                  number(weights.columns()));
  if (rows < 0 || !countable(columns, rows) || !countable(weights.outputs, rows))
    return refuse(Code::kWrongShape, "x: %lld rows of %lld values to %lld outputs are too many", number(rows),
                  number(columns), number(weights.outputs));
  return {};
}

Status check_conv2d(const Weights& weights, const Conv2d& layer, const std::int64_t x_shape[4],
                    std::int64_t y_shape[4]) {
  if (layer.groups != 1) return refuse(Code::kUnsupported, "group is %lld, must be 1", number(layer.groups));
  for (int i = 0; i < 4; ++i)
    if (x_shape[i] < (i == 0 ? 0 : 1) || x_shape[i] > kMaxSize)
      return refuse(Code::kWrongShape, "x: size %d of [B, I, H, W] is %lld", i, number(x_shape[i]));
  y_shape[0] = x_shape[0];
  y_shape[1] = weights.outputs;
  for (int axis = 0; axis < 2; ++axis) {
    const std::int64_t kernel = layer.kernel[axis], stride = layer.stride[axis], dilation = layer.dilation[axis];
    const std::int64_t before = layer.padding[axis], after = layer.padding[axis + 2], size = x_shape[axis + 2];
    if (kernel < 1 || stride < 1 || dilation < 1 || before < 0 || after < 0 || kernel > kMaxSize || stride > kMaxSize ||
        dilation > kMaxSize || before > kMaxSize || after > kMaxSize)
      return refuse(Code::kWrongShape, "kernel %lld, stride %lld, dilation %lld, padding %lld and %lld: out of range",
                    number(kernel), number(stride), number(dilation), number(before), number(after));
    const std::int64_t reach = (kernel - 1) * dilation + 1, padded = size + before + after;
    if (reach > padded)
      return refuse(Code::kWrongShape, "a kernel over %lld pixels does not fit %lld of x and padding", number(reach),
                    number(padded));
    y_shape[axis + 2] = (padded - reach) / stride + 1;
  }
  const std::int64_t taps =
      layer.kernel[0] <= kMaxSize / layer.kernel[1] ? layer.kernel[0] * layer.kernel[1] : kMaxSize;
  if (x_shape[1] > kMaxSize / taps || taps * x_shape[1] != weights.columns())
    return refuse(Code::kWrongShape, "x: %lld channels at %lld x %lld taps, the weights have %lld columns",
                  number(x_shape[1]), number(layer.kernel[0]), number(layer.kernel[1]), number(weights.columns()));
  if (x_shape[1] % weights.length != 0)
    return refuse(Code::kUnsupported, "x: %lld channels are no multiple of vectors of %lld weights", number(x_shape[1]),
                  number(weights.length));
  for (const std::int64_t* shape : {x_shape, static_cast<const std::int64_t*>(y_shape)})
    if (!countable(shape[2], shape[3]) || !countable(shape[2] * shape[3], shape[1]) ||
        !countable(shape[2] * shape[3] * shape[1], shape[0]))
      return refuse(Code::kWrongShape, "%s: [%lld, %lld, %lld, %lld] is too large", shape == x_shape ? "x" : "y",
                    number(shape[0]), number(shape[1]), number(shape[2]), number(shape[3]));
  return {};
}

}  // namespace codebook
