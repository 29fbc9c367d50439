// SPDX-License-Identifier: Apache-2.0
#include "serve.h"

#include <cstring>
#include <map>
#include <unistd.h>

#include "model.h"
#include "process.h"
#include "wire.h"

namespace runner {

namespace {

using Models = std::map<std::string, std::unique_ptr<Model>>;

Model& opened(Models& models, const std::string& key) {
  const auto found = models.find(key);
  if (found == models.end()) throw Failure("no model is open under " + key);
  return *found->second;
}

Tensor kernel_addresses() {
  const auto ranges = code_of("libexecutorch");
  Tensor tensor{"kernel_addresses", dtype_int64, {int32_t(ranges.size()), 2}, {}};
  for (const auto& [start, end] : ranges) {
    for (int64_t address : {start, end}) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(&address);
      tensor.data.insert(tensor.data.end(), bytes, bytes + sizeof address);
    }
  }
  return tensor;
}

// Arguments are read whole before anything can fail, so that the next request is found.
std::vector<Tensor> answer(uint8_t verb, const std::string& key, Reader& requests, Models& models) {
  switch (Verb(verb)) {
    case Verb::open: {
      const std::string program = requests.text(), data = requests.text();
      models[key] = std::make_unique<Model>(program, data);
      return {};
    }
    case Verb::run: {
      auto inputs = requests.tensors();
      const auto outputs = requests.texts();
      return opened(models, key).run(inputs, outputs);
    }
    case Verb::close:
      opened(models, key);
      models.erase(key);
      return {};
    case Verb::about:
      return {kernel_addresses()};
  }
  throw Broken("verb " + std::to_string(verb));
}

}  // namespace

void serve() {
  // What libraries print goes to stderr, so that it does not fall between tensors.
  FILE* const replies_pipe = fdopen(dup(STDOUT_FILENO), "wb");
  if (replies_pipe == nullptr || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) throw Broken("stdout can not be used");
  Reader requests(stdin);
  Writer replies(replies_pipe);
  Models models;
  for (uint8_t verb; requests.next(verb);) {
    const std::string key = requests.text();
    try {
      replies.done(answer(verb, key, requests, models));
    } catch (const Broken&) {
      throw;
    } catch (const std::exception& error) {
      replies.failed(error.what());
    }
  }
}

}  // namespace runner
