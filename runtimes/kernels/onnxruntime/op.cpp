// SPDX-License-Identifier: Apache-2.0
// ONNX operators CodebookLinear<books> and CodebookConv2d<books>, domain "turbopocket", version 1, for ONNX Runtime's CPU
// provider; each also as ...Biased.
//
// Inputs: x, codes, codebooks, scale and, of those that are biased, bias, as core/codebook.h has them. Convolutions have
// the attributes weight_shape [O, kh, kw, I], strides, pads, dilations. A model brings a body of standard operators for
// each that it has, which ONNX Runtime takes where this library is not registered. Bodies differ by the number of books
// and by the bias, kernels do not; they have names of their own because ONNX Runtime before 1.27 knows bodies by name.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "codebook.h"

namespace {

// The first version with KernelContext_ParallelFor. The interface only ever grows at its end, so every later runtime
// has it, whatever version the headers are of.
constexpr std::uint32_t kApiVersion = 17;
constexpr std::size_t kMostThreads = 8;
constexpr std::size_t kMostDimensions = 8;
constexpr std::size_t kBias = 4;  // the last input
constexpr int kMostBooks = 8;

const OrtApi* ort = nullptr;

OrtStatusPtr refuse(const char* message) { return ort->CreateStatus(ORT_INVALID_ARGUMENT, message); }

OrtStatusPtr answer(const codebook::Status& status) {
  if (status.ok()) return nullptr;
  const bool memory = status.code == codebook::Code::kOutOfMemory;
  return ort->CreateStatus(memory ? ORT_FAIL : ORT_INVALID_ARGUMENT, status.message);
}

// An input's data and shape; `data` stays null when the node does not have it.
template <class T>
struct Input {
  const T* data = nullptr;
  std::int64_t shape[kMostDimensions] = {};
  std::size_t rank = 0;

  OrtStatusPtr read(const OrtKernelContext* context, std::size_t index) {
    const OrtValue* value = nullptr;
    if (OrtStatusPtr status = ort->KernelContext_GetInput(context, index, &value)) return status;
    if (value == nullptr) return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatusPtr status = ort->GetTensorTypeAndShape(value, &info)) return status;
    OrtStatusPtr status = ort->GetDimensionsCount(info, &rank);
    if (status == nullptr && rank > kMostDimensions) status = refuse("a tensor has more than 8 dimensions");
    if (status == nullptr) status = ort->GetDimensions(info, shape, rank);
    ort->ReleaseTensorTypeAndShapeInfo(info);
    void* bytes = nullptr;
    if (status == nullptr) status = ort->GetTensorMutableData(const_cast<OrtValue*>(value), &bytes);
    data = static_cast<const T*>(bytes);
    return status;
  }
  codebook::Array<T> array() const { return {data, shape, rank}; }
};

OrtStatusPtr read_weights(const OrtKernelContext* context, codebook::Weights* weights) {
  Input<std::uint8_t> codes;
  Input<std::uint16_t> codebooks, scale;
  Input<float> bias;
  std::size_t inputs = 0;
  if (OrtStatusPtr status = ort->KernelContext_GetInputCount(context, &inputs)) return status;
  if (OrtStatusPtr status = codes.read(context, 1)) return status;
  if (OrtStatusPtr status = codebooks.read(context, 2)) return status;
  if (OrtStatusPtr status = scale.read(context, 3)) return status;
  if (inputs > kBias)
    if (OrtStatusPtr status = bias.read(context, kBias)) return status;
  return answer(codebook::check_weights(codes.array(), codebooks.array(), scale.array(), bias.array(), weights));
}

OrtStatusPtr make_output(OrtKernelContext* context, const std::int64_t* shape, std::size_t rank, float** y) {
  OrtValue* value = nullptr;
  if (OrtStatusPtr status = ort->KernelContext_GetOutput(context, 0, shape, rank, &value)) return status;
  void* data = nullptr;
  OrtStatusPtr status = ort->GetTensorMutableData(value, &data);
  *y = static_cast<float*>(data);
  return status;
}

// The session's threads. How many it has cannot be asked: more tasks than threads only cost their start.
struct Pool {
  const OrtKernelContext* context;
  OrtStatusPtr status = nullptr;

  static void run(void* pool, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
    Pool& self = *static_cast<Pool*>(pool);
    self.status = ort->KernelContext_ParallelFor(self.context, task, count, 0, argument);
  }
  codebook::Threads threads() {
    const std::size_t cores = std::max<std::size_t>(1, std::thread::hardware_concurrency());
    return {run, this, std::min(cores, kMostThreads)};
  }
};

struct Linear {
  static constexpr const char* name = "CodebookLinear";

  OrtStatusPtr create(const OrtKernelInfo*) { return nullptr; }

  OrtStatusPtr compute(OrtKernelContext* context) const {
    codebook::Weights weights;
    Input<float> x;
    if (OrtStatusPtr status = read_weights(context, &weights)) return status;
    if (OrtStatusPtr status = x.read(context, 0)) return status;
    if (x.rank < 1) return refuse("x: must have the shape [..., columns]");
    std::int64_t rows = 1;
    for (std::size_t i = 0; i + 1 < x.rank; ++i) rows *= x.shape[i];
    const std::int64_t columns = x.shape[x.rank - 1];
    if (OrtStatusPtr status = answer(codebook::check_linear(weights, rows, columns))) return status;
    x.shape[x.rank - 1] = weights.outputs;
    float* y = nullptr;
    if (OrtStatusPtr status = make_output(context, x.shape, x.rank, &y)) return status;
    Pool pool{context};
    const codebook::Status done = codebook::linear(weights, x.data, rows, columns, y, pool.threads());
    return pool.status ? pool.status : answer(done);
  }
};

struct Conv2d {
  static constexpr const char* name = "CodebookConv2d";

  codebook::Conv2d layer;
  std::int64_t weight_shape[4];

  OrtStatusPtr create(const OrtKernelInfo* info) {
    if (OrtStatusPtr status = read(info, "weight_shape", 4, weight_shape, false)) return status;
    std::copy(weight_shape + 1, weight_shape + 3, layer.kernel);
    if (OrtStatusPtr status = read(info, "strides", 2, layer.stride, true)) return status;
    if (OrtStatusPtr status = read(info, "pads", 4, layer.padding, true)) return status;
    return read(info, "dilations", 2, layer.dilation, true);
  }

  OrtStatusPtr compute(OrtKernelContext* context) const {
    codebook::Weights weights;
    Input<float> x;
    if (OrtStatusPtr status = read_weights(context, &weights)) return status;
    if (OrtStatusPtr status = x.read(context, 0)) return status;
    if (x.rank != 4) return refuse("x: must have the shape [B, I, H, W]");
    if (weights.outputs != weight_shape[0] || x.shape[1] != weight_shape[3])
      return refuse("weight_shape: outputs or inputs are not those of codes and x");
    std::int64_t y_shape[4];
    if (OrtStatusPtr status = answer(codebook::check_conv2d(weights, layer, x.shape, y_shape))) return status;
    float* y = nullptr;
    if (OrtStatusPtr status = make_output(context, y_shape, 4, &y)) return status;
    Pool pool{context};
    const codebook::Status done = codebook::conv2d(weights, layer, x.data, x.shape, y, pool.threads());
    return pool.status ? pool.status : answer(done);
  }

 private:
  // Fills `values` from an attribute of exactly `wanted` integers; an optional one that is not there leaves them.
  static OrtStatusPtr read(const OrtKernelInfo* info, const char* name, std::size_t wanted, std::int64_t* values,
                           bool optional) {
    std::size_t found = 0;
    if (OrtStatusPtr status = ort->KernelInfoGetAttributeArray_int64(info, name, nullptr, &found)) {
      if (!optional) return status;
      ort->ReleaseStatus(status);
      return nullptr;
    }
    if (found != wanted) return refuse("CodebookConv2d: an attribute has the wrong number of values");
    return ort->KernelInfoGetAttributeArray_int64(info, name, values, &found);
  }
};

struct Operator : OrtCustomOp {
  std::string name;
  std::size_t inputs;

  static const Operator& of(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }
};

// What ONNX Runtime asks an operator for.
template <class Kernel>
Operator describe(int books, bool biased) {
  Operator op{};
  op.name = Kernel::name + std::to_string(books) + (biased ? "Biased" : "");
  op.inputs = biased ? kBias + 1 : kBias;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return Operator::of(op).name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return Operator::of(op).inputs; };
  op.GetInputType = [](const OrtCustomOp*, std::size_t index) {
    if (index == 1) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    return index == 2 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size_t{1}; };
  op.GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** made) -> OrtStatusPtr {
    Kernel* kernel = new (std::nothrow) Kernel();
    if (kernel == nullptr) return ort->CreateStatus(ORT_FAIL, "no memory for a kernel");
    OrtStatusPtr status = kernel->create(info);
    if (status != nullptr) {
      delete kernel;
      kernel = nullptr;
    }
    *made = kernel;
    return status;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

std::vector<Operator> all_operators() {
  std::vector<Operator> operators;
  for (int books = 1; books <= kMostBooks; ++books)
    for (bool biased : {false, true}) {
      operators.push_back(describe<Linear>(books, biased));
      operators.push_back(describe<Conv2d>(books, biased));
    }
  return operators;
}

// The domain with all operators, made once and used by every session of the process.
OrtStatusPtr find_domain(OrtCustomOpDomain** domain) {
  static const std::vector<Operator> operators = all_operators();
  static OrtCustomOpDomain* made = nullptr;
  if (made == nullptr) {
    if (OrtStatusPtr status = ort->CreateCustomOpDomain("turbopocket", &made)) return status;
    for (const Operator& op : operators)
      if (OrtStatusPtr status = ort->CustomOpDomain_Add(made, &op)) return status;
  }
  *domain = made;
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  ort = base->GetApi(kApiVersion);
  if (ort == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "codebook kernels need ONNX Runtime 1.17 or later");
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatusPtr status = find_domain(&domain)) return status;
  return ort->AddCustomOpDomain(options, domain);
}
