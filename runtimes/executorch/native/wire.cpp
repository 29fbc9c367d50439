// SPDX-License-Identifier: Apache-2.0
// Numbers travel as they lie in memory, little-endian, which both x86-64 and aarch64 Linux are.
#include "wire.h"

#include <algorithm>

#include <limits>

namespace runner {

namespace {
const char* const dtype_names[] = {"float32", "float16", "int64", "int32", "uint8", "int8", "bool"};
static_assert(sizeof(dtype_names) / sizeof(dtype_names[0]) == dtype_count);
}  // namespace

std::string describe(uint8_t dtype, const std::vector<int32_t>& shape) {
  std::string text = std::string(dtype_names[dtype]) + " [";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool Reader::next(uint8_t& verb) {
  return fread(&verb, 1, 1, pipe_) == 1;
}

void Reader::exactly(void* into, size_t bytes) {
  if (fread(into, 1, bytes, pipe_) != bytes) throw Broken("the pipe ended in the middle of a request");
}

uint32_t Reader::count(uint32_t limit) {
  uint32_t value;
  exactly(&value, sizeof value);
  if (value > limit) throw Broken("a count of " + std::to_string(value) + ", the limit is " + std::to_string(limit));
  return value;
}

std::string Reader::text() {
  std::string value(count(max_text_bytes), '\0');
  exactly(value.data(), value.size());
  return value;
}

std::vector<std::string> Reader::texts() {
  std::vector<std::string> values(count(max_tensors));
  for (auto& value : values) value = text();
  return values;
}

std::vector<Tensor> Reader::tensors() {
  std::vector<Tensor> values;
  for (uint32_t left = count(max_tensors); left > 0; --left) values.push_back(tensor());
  return values;
}

Tensor Reader::tensor() {
  Tensor value;
  value.name = text();
  uint8_t rank;
  exactly(&value.dtype, 1);
  exactly(&rank, 1);
  if (value.dtype >= dtype_count || rank > max_rank) {
    throw Broken("tensor " + value.name + " has type " + std::to_string(value.dtype) + " and rank " + std::to_string(rank));
  }
  uint64_t bytes = element_bytes[value.dtype];
  bool empty = false;
  for (uint8_t i = 0; i < rank; ++i) {
    uint32_t size;
    exactly(&size, sizeof size);
    if (size > uint32_t(std::numeric_limits<int32_t>::max())) throw Broken("tensor " + value.name + " is too large");
    value.shape.push_back(int32_t(size));
    empty = empty || size == 0;
    // Checked at every step, so that the product can not wrap around.
    if (!empty && (bytes *= size) > max_tensor_bytes) throw Broken("tensor " + value.name + " is too large");
  }
  value.data.resize(empty ? 0 : bytes);
  exactly(value.data.data(), value.data.size());
  return value;
}

void Writer::bytes(const void* from, size_t size) {
  if (fwrite(from, 1, size, pipe_) != size) throw Broken("nobody reads the answer");
}

void Writer::count(size_t value) {
  const uint32_t number = uint32_t(value);
  bytes(&number, sizeof number);
}

void Writer::text(const std::string& value) {
  const size_t size = std::min<size_t>(value.size(), max_text_bytes);
  count(size);
  bytes(value.data(), size);
}

void Writer::done(const std::vector<Tensor>& tensors) {
  const auto status = Status::done;
  bytes(&status, 1);
  count(tensors.size());
  for (const auto& tensor : tensors) {
    text(tensor.name);
    const uint8_t head[] = {tensor.dtype, uint8_t(tensor.shape.size())};
    bytes(head, sizeof head);
    for (int32_t size : tensor.shape) count(size_t(size));
    bytes(tensor.data.data(), tensor.data.size());
  }
  fflush(pipe_);
}

void Writer::failed(const std::string& reason) {
  const auto status = Status::failed;
  bytes(&status, 1);
  text(reason);
  fflush(pipe_);
}

}  // namespace runner
