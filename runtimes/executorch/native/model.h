// SPDX-License-Identifier: Apache-2.0
// One .pte program, whose method `forward` takes and gives tensors.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "wire.h"

namespace runner {

class Model {
 public:
  // Maps the file into memory; `data` is its .ptd file, or "". Throws Failure for files that ExecuTorch does not take.
  Model(const std::string& program, const std::string& data);
  ~Model();

  // Outputs under these names, in the program's order. Throws Failure when inputs are not exactly of the program's
  // types and shapes, when there are other than this many outputs, and when the run fails.
  std::vector<Tensor> run(std::vector<Tensor>& inputs, const std::vector<std::string>& outputs);

  // What `run` takes, all zeros.
  std::vector<Tensor> zero_inputs() const;

  size_t output_count() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace runner
