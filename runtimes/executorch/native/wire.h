// SPDX-License-Identifier: Apache-2.0
// The protocol of runtimes/served/wire.py: tensors over pipes. Nothing that comes in is trusted.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace runner {

// What went wrong, for the other side to read.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The other side ended, or does not speak this protocol: there is nobody to answer.
struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Verb : uint8_t { open = 1, run = 2, close = 3, about = 4 };
enum class Status : uint8_t { done = 0, failed = 1 };

constexpr uint32_t max_text_bytes = 1u << 16;
constexpr uint32_t max_tensors = 1u << 12;
constexpr uint32_t max_rank = 8;
constexpr uint64_t max_tensor_bytes = 1ull << 31;

// Element sizes by index: float32, float16, int64, int32, uint8, int8, bool.
constexpr uint64_t element_bytes[] = {4, 2, 8, 4, 1, 1, 1};
constexpr uint8_t dtype_count = sizeof(element_bytes) / sizeof(element_bytes[0]);
constexpr uint8_t dtype_int64 = 2;

struct Tensor {
  std::string name;
  uint8_t dtype;
  std::vector<int32_t> shape;
  std::vector<uint8_t> data;
};

// "float32 [1, 77]", for messages.
std::string describe(uint8_t dtype, const std::vector<int32_t>& shape);

class Reader {
 public:
  explicit Reader(FILE* pipe) : pipe_(pipe) {}

  // False when the pipe ended between two requests, as it does at the end.
  bool next(uint8_t& verb);
  std::string text();
  std::vector<std::string> texts();
  std::vector<Tensor> tensors();

 private:
  void exactly(void* into, size_t bytes);
  uint32_t count(uint32_t limit);
  Tensor tensor();

  FILE* pipe_;
};

class Writer {
 public:
  explicit Writer(FILE* pipe) : pipe_(pipe) {}

  void done(const std::vector<Tensor>& tensors);
  void failed(const std::string& reason);

 private:
  void bytes(const void* from, size_t size);
  void count(size_t value);
  void text(const std::string& value);

  FILE* pipe_;
};

}  // namespace runner
