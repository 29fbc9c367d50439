// SPDX-License-Identifier: Apache-2.0
#include "c_api.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "codebook.h"

namespace {

using codebook::Code;
using codebook::Status;

int answer(const Status& status, char* message) {
  std::memcpy(message, status.message, sizeof status.message);
  return static_cast<int>(status.code);
}
static_assert(sizeof(Status::message) == CODEBOOK_MESSAGE, "callers give room for one message");

Status read(const codebook_weights& from, codebook::Weights* weights) {
  return codebook::check_weights(
      {from.codes, from.codes_shape, from.codes_rank}, {from.codebooks, from.codebooks_shape, from.codebooks_rank},
      {from.scale, from.scale_shape, from.scale_rank}, {from.bias, from.bias_shape, from.bias_rank}, weights);
}

codebook::Conv2d read(const codebook_conv2d_layer& from) {
  codebook::Conv2d layer;
  std::copy(from.kernel, from.kernel + 2, layer.kernel);
  std::copy(from.stride, from.stride + 2, layer.stride);
  std::copy(from.padding, from.padding + 4, layer.padding);
  std::copy(from.dilation, from.dilation + 2, layer.dilation);
  layer.groups = from.groups;
  return layer;
}

Status find(const char* name, const codebook::Path** path) {
  *path = nullptr;
  if (name == nullptr) return {};
  for (const codebook::Path* const* known = codebook::paths(); *known != nullptr; ++known)
    if (std::strcmp(codebook::path_name(*known), name) == 0) *path = *known;
  Status status;
  if (*path == nullptr) {
    status.code = Code::kUnsupported;
    std::snprintf(status.message, sizeof status.message, "path %.40s: not on this processor", name);
  }
  return status;
}

void run_on_threads(void*, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < count; ++i) threads.emplace_back(task, argument, i);
  task(argument, 0);
  for (std::thread& thread : threads) thread.join();
}

codebook::Threads pool(size_t threads) {
  return threads < 2 ? codebook::Threads{} : codebook::Threads{run_on_threads, nullptr, threads};
}

}  // namespace

const char* codebook_path(size_t i) {
  const codebook::Path* const* path = codebook::paths();
  for (; *path != nullptr; ++path, --i)
    if (i == 0) return codebook::path_name(*path);
  return nullptr;
}

int codebook_linear(const codebook_weights* from, const float* x, int64_t rows, int64_t columns, float* y,
                    const char* path_name, size_t threads, char* message) {
  codebook::Weights weights;
  const codebook::Path* path;
  Status status = read(*from, &weights);
  if (status.ok()) status = find(path_name, &path);
  if (status.ok()) status = codebook::linear(weights, x, rows, columns, y, pool(threads), path);
  return answer(status, message);
}

int codebook_conv2d(const codebook_weights* from, const codebook_conv2d_layer* layer, const float* x,
                    const int64_t* x_shape, float* y, const char* path_name, size_t threads, char* message) {
  codebook::Weights weights;
  const codebook::Path* path;
  Status status = read(*from, &weights);
  if (status.ok()) status = find(path_name, &path);
  if (status.ok()) status = codebook::conv2d(weights, read(*layer), x, x_shape, y, pool(threads), path);
  return answer(status, message);
}

int codebook_conv2d_shape(const codebook_weights* from, const codebook_conv2d_layer* layer, const int64_t* x_shape,
                          int64_t* y_shape, char* message) {
  codebook::Weights weights;
  Status status = read(*from, &weights);
  if (status.ok()) status = codebook::check_conv2d(weights, read(*layer), x_shape, y_shape);
  return answer(status, message);
}

int codebook_decode(const codebook_weights* from, float* dense, char* message) {
  codebook::Weights weights;
  Status status = read(*from, &weights);
  if (status.ok()) status = codebook::decode(weights, dense);
  return answer(status, message);
}

size_t codebook_scratch_bytes_per_thread(void) { return codebook::scratch_bytes_per_thread(); }
