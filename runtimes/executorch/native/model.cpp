// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <cstring>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

namespace runner {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Program;

namespace {

constexpr ScalarType scalar_types[] = {ScalarType::Float, ScalarType::Half, ScalarType::Long, ScalarType::Int,
                                       ScalarType::Byte,  ScalarType::Char, ScalarType::Bool};
static_assert(sizeof(scalar_types) / sizeof(scalar_types[0]) == dtype_count);

uint8_t dtype_of(ScalarType type, const std::string& what) {
  for (uint8_t i = 0; i < dtype_count; ++i) {
    if (scalar_types[i] == type) return i;
  }
  throw Failure(what + " has element type " + std::to_string(int(type)) + ", which is not supported");
}

void require(Error error, const std::string& what) {
  if (error != Error::Ok) throw Failure(what + ": " + executorch::runtime::to_string(error));
}

Tensor empty_tensor(uint8_t dtype, std::vector<int32_t> shape) {
  uint64_t bytes = element_bytes[dtype];
  for (int32_t size : shape) {
    bytes *= uint64_t(size);
    if (size < 0 || bytes > max_tensor_bytes) throw Failure("a tensor of the program is too large");
  }
  return {"", dtype, std::move(shape), std::vector<uint8_t>(bytes)};
}

}  // namespace

struct Model::State {
  std::unique_ptr<Module> module;
  // Types and shapes of what `forward` takes; no values.
  std::vector<std::pair<uint8_t, std::vector<int32_t>>> inputs;
  size_t outputs = 0;
};

Model::Model(const std::string& program, const std::string& data) : state_(std::make_unique<State>()) {
  const auto mode = Module::LoadMode::Mmap;
  state_->module =
      data.empty() ? std::make_unique<Module>(program, mode) : std::make_unique<Module>(program, data, mode);
  require(state_->module->load(Program::Verification::InternalConsistency), program + " can not be read");
  require(state_->module->load_method("forward"), program + " can not be made ready to run");
  const auto meta = state_->module->method_meta("forward");
  require(meta.error(), program);
  for (size_t i = 0; i < meta->num_inputs(); ++i) {
    const auto input = meta->input_tensor_meta(i);
    require(input.error(), program + ", input " + std::to_string(i) + " is not a tensor");
    const auto sizes = input->sizes();
    state_->inputs.emplace_back(dtype_of(input->scalar_type(), "input " + std::to_string(i)),
                                std::vector<int32_t>(sizes.begin(), sizes.end()));
  }
  state_->outputs = meta->num_outputs();
}

Model::~Model() = default;

size_t Model::output_count() const {
  return state_->outputs;
}

std::vector<Tensor> Model::zero_inputs() const {
  std::vector<Tensor> zeros;
  for (const auto& [dtype, shape] : state_->inputs) zeros.push_back(empty_tensor(dtype, shape));
  return zeros;
}

std::vector<Tensor> Model::run(std::vector<Tensor>& inputs, const std::vector<std::string>& outputs) {
  if (inputs.size() != state_->inputs.size() || outputs.size() != state_->outputs) {
    throw Failure("the program has " + std::to_string(state_->inputs.size()) + " inputs and " +
                  std::to_string(state_->outputs) + " outputs, asked were " + std::to_string(inputs.size()) + " and " +
                  std::to_string(outputs.size()));
  }
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto& [dtype, shape] = state_->inputs[i];
    if (inputs[i].dtype != dtype || inputs[i].shape != shape) {
      throw Failure("input " + inputs[i].name + " is " + describe(inputs[i].dtype, inputs[i].shape) +
                    ", the program takes " + describe(dtype, shape));
    }
    tensors.push_back(executorch::extension::from_blob(inputs[i].data.data(), shape, scalar_types[dtype]));
    values.emplace_back(tensors.back());
  }
  const auto results = state_->module->forward(values);
  require(results.error(), "the run failed");
  std::vector<Tensor> found;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!results->at(i).isTensor()) throw Failure("output " + outputs[i] + " is not a tensor");
    const auto tensor = results->at(i).toTensor();
    const auto sizes = tensor.sizes();
    Tensor copy = empty_tensor(dtype_of(tensor.scalar_type(), outputs[i]), {sizes.begin(), sizes.end()});
    if (copy.data.size() != size_t(tensor.nbytes())) throw Failure("output " + outputs[i] + " has an odd size");
    std::memcpy(copy.data.data(), tensor.const_data_ptr(), copy.data.size());
    copy.name = outputs[i];
    found.push_back(std::move(copy));
  }
  return found;
}

}  // namespace runner
