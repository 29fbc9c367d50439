// SPDX-License-Identifier: Apache-2.0
// ExecuTorch operators turbopocket::codebook_linear.out and turbopocket::codebook_conv2d.out, on its thread pool.
//
//   codebook_linear(Tensor x, Tensor codes, Tensor codebooks, Tensor scale, Tensor? bias)
//   codebook_conv2d(the same, int[] kernel, int[] stride, int[] padding, int[] dilation), two values each
//
// Arrays are those of core/codebook.h. Kernels take their arguments from the stack themselves: ExecuTorch's own unboxing
// aborts the process where a program has something else than the schema says, and programs are untrusted.
#define ET_USE_THREADPOOL
#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "codebook.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

constexpr std::size_t kMaxDimensions = 8;
enum Argument : std::size_t { kX, kCodes, kCodebooks, kScale, kBias, kGeometry };
constexpr std::size_t kGeometries = 4;  // kernel, stride, padding, dilation

struct Shape {
  std::int64_t sizes[kMaxDimensions] = {};
  std::size_t rank = 0;
};

// Says what is wrong in the log, and stops the run.
void refuse(KernelRuntimeContext& context, const char* message, Error error = Error::InvalidArgument) {
  ET_LOG(Error, "codebook kernel: %s", message);
  context.fail(error);
}

bool passed(KernelRuntimeContext& context, const codebook::Status& status) {
  if (status.ok()) return true;
  const bool memory = status.code == codebook::Code::kOutOfMemory;
  refuse(context, status.message, memory ? Error::MemoryAllocationFailed : Error::InvalidArgument);
  return false;
}

// A tensor of this type whose values lie in the order of its dimensions; null when the value is anything else.
const Tensor* tensor_of(const EValue& value, ScalarType type, Shape* shape) {
  if (!value.isTensor()) return nullptr;
  const Tensor& tensor = value.toTensor();
  const std::size_t rank = static_cast<std::size_t>(tensor.dim());
  if (tensor.scalar_type() != type || rank > kMaxDimensions) return nullptr;
  if (!executorch::runtime::is_contiguous_dim_order(tensor.dim_order().data(), rank)) return nullptr;
  shape->rank = rank;
  for (std::size_t i = 0; i < rank; ++i) shape->sizes[i] = tensor.size(static_cast<ssize_t>(i));
  return &tensor;
}

template <class T>
codebook::Array<T> array(const Tensor& tensor, const Shape& shape) {
  return {static_cast<const T*>(tensor.const_data_ptr()), shape.sizes, shape.rank};
}

bool read_weights(KernelRuntimeContext& context, Span<EValue*> stack, codebook::Weights* weights) {
  Shape of_codes, of_codebooks, of_scale, of_bias;
  const Tensor* codes = tensor_of(*stack[kCodes], ScalarType::Byte, &of_codes);
  const Tensor* codebooks = tensor_of(*stack[kCodebooks], ScalarType::Half, &of_codebooks);
  const Tensor* scale = tensor_of(*stack[kScale], ScalarType::Half, &of_scale);
  const bool biased = !stack[kBias]->isNone();
  const Tensor* bias = biased ? tensor_of(*stack[kBias], ScalarType::Float, &of_bias) : nullptr;
  if (codes == nullptr || codebooks == nullptr || scale == nullptr || (biased && bias == nullptr)) {
    refuse(context, "codes must be uint8, codebooks and scale fp16, bias fp32 or absent, all contiguous");
    return false;
  }
  const codebook::Array<float> bias_array = biased ? array<float>(*bias, of_bias) : codebook::Array<float>{};
  return passed(context, codebook::check_weights(array<std::uint8_t>(*codes, of_codes),
                                                 array<std::uint16_t>(*codebooks, of_codebooks),
                                                 array<std::uint16_t>(*scale, of_scale), bias_array, weights));
}

// The output's values, once it has this shape; null when it can not.
float* output(KernelRuntimeContext& context, EValue& value, const std::int64_t* shape, std::size_t rank) {
  Shape planned;
  if (tensor_of(value, ScalarType::Float, &planned) != nullptr) {
    SizesType sizes[kMaxDimensions];
    for (std::size_t i = 0; i < rank; ++i) sizes[i] = static_cast<SizesType>(shape[i]);
    Tensor& tensor = value.toTensor();
    if (executorch::runtime::resize_tensor(tensor, {sizes, rank}) == Error::Ok)
      return tensor.mutable_data_ptr<float>();
  }
  refuse(context, "the output must be fp32, contiguous, and have room for the result");
  return nullptr;
}

void run(void*, std::size_t count, void (*task)(void* argument, std::size_t index), void* argument) {
  executorch::extension::parallel_for(0, static_cast<std::int64_t>(count), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) task(argument, static_cast<std::size_t>(i));
  });
}

codebook::Threads threads() {
  return {run, nullptr, static_cast<std::size_t>(executorch::extension::get_thread_count())};
}

void linear(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr std::size_t kOut = kBias + 1;
  if (stack.size() <= kOut) return refuse(context, "too few arguments");
  codebook::Weights weights;
  if (!read_weights(context, stack, &weights)) return;
  Shape shape;
  const Tensor* x = tensor_of(*stack[kX], ScalarType::Float, &shape);
  if (x == nullptr || shape.rank < 1) return refuse(context, "x must be fp32 of shape [..., columns], contiguous");
  std::int64_t rows = 1;
  for (std::size_t i = 0; i + 1 < shape.rank; ++i) rows *= shape.sizes[i];
  const std::int64_t columns = shape.sizes[shape.rank - 1];
  if (!passed(context, codebook::check_linear(weights, rows, columns))) return;
  shape.sizes[shape.rank - 1] = weights.outputs;
  float* y = output(context, *stack[kOut], shape.sizes, shape.rank);
  if (y != nullptr) passed(context, codebook::linear(weights, x->const_data_ptr<float>(), rows, columns, y, threads()));
}

bool read_geometry(KernelRuntimeContext& context, Span<EValue*> stack, codebook::Conv2d* layer) {
  std::int64_t* const axes[kGeometries] = {layer->kernel, layer->stride, layer->padding, layer->dilation};
  for (std::size_t i = 0; i < kGeometries; ++i) {
    const EValue& value = *stack[kGeometry + i];
    const auto found = value.tryToIntList();
    if (!found.ok() || found->size() != 2) {
      refuse(context, "kernel, stride, padding and dilation must be two integers each");
      return false;
    }
    for (std::size_t axis = 0; axis < 2; ++axis) axes[i][axis] = (*found)[axis];
  }
  layer->padding[2] = layer->padding[0];
  layer->padding[3] = layer->padding[1];
  return true;
}

void conv2d(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr std::size_t kOut = kGeometry + kGeometries;
  if (stack.size() <= kOut) return refuse(context, "too few arguments");
  codebook::Weights weights;
  codebook::Conv2d layer;
  if (!read_weights(context, stack, &weights) || !read_geometry(context, stack, &layer)) return;
  Shape shape;
  const Tensor* x = tensor_of(*stack[kX], ScalarType::Float, &shape);
  if (x == nullptr || shape.rank != 4) return refuse(context, "x must be fp32 of shape [B, I, H, W], contiguous");
  std::int64_t y_shape[4];
  if (!passed(context, codebook::check_conv2d(weights, layer, shape.sizes, y_shape))) return;
  float* y = output(context, *stack[kOut], y_shape, 4);
  if (y != nullptr)
    passed(context, codebook::conv2d(weights, layer, x->const_data_ptr<float>(), shape.sizes, y, threads()));
}

const Kernel kKernels[] = {Kernel("turbopocket::codebook_linear.out", linear),
                           Kernel("turbopocket::codebook_conv2d.out", conv2d)};
[[maybe_unused]] const Error kRegistered = executorch::runtime::register_kernels({kKernels, 2});

}  // namespace
