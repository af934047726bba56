// Schemas of torch.ops.torch_int4 and every check of their arguments. LibTorch stable ABI only.
#include <Python.h>
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "codebooks.h"
#include "dispatch.h"
#include "linear.h"
#include "memory.h"
#include "pack.h"
#include "tensors.h"

namespace torch_int4 {
namespace {

constexpr int64_t kMaxGroup = 1024;

WeightType weight_type(const std::string& name) {
  if (name == "int4") return WeightType::kInt4;
  if (name == "int8") return WeightType::kInt8;
  STD_TORCH_CHECK(find_codebook(name.c_str()), "torch_int4: weight_type must be 'int4', 'int8', 'nf4' or 'fp4', not '",
                  name, "'");
  return WeightType::kBook;
}

ScaleType scale_type(const Tensor& scales) {
  if (scales.scalar_type() == ScalarType::Float) return ScaleType::kF32;
  if (scales.scalar_type() == ScalarType::Byte) return ScaleType::kE8M0;
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Half,
                  "torch_int4: scales must be float16, float32 or uint8 (powers of two, E8M0)");
  return ScaleType::kF16;
}

Compute compute_type(const std::string& name) {
  if (name == "int8") return Compute::kInt8;
  if (name == "int8x2") return Compute::kInt8x2;
  if (name == "bf16") return Compute::kBf16;
  STD_TORCH_CHECK(name == "fp32", "torch_int4: compute must be 'int8', 'int8x2', 'bf16' or 'fp32', not '", name, "'");
  return Compute::kFp32;
}

// Zero points suit integer codes, float offsets scales that are floats; values of a code book stand as they are.
void check_offset(const PackedWeight& w) {
  STD_TORCH_CHECK(!w.book || w.offset == Offset::kSymmetric, "torch_int4: a weight with a code book has no offsets");
  STD_TORCH_CHECK(w.scale_type != ScaleType::kE8M0 || w.offset != Offset::kFloat,
                  "torch_int4: float offsets need float scales");
}

// The shape of a weight, without its data. A short K makes the group shorter; -1 is one group per row.
PackedWeight make_shape(int64_t out_features, int64_t in_features, int64_t group_size, const std::string& type) {
  const bool valid = group_size == -1 || (group_size > 0 && group_size <= kMaxGroup && group_size % kSlab == 0 &&
                                          (group_size <= kMaxBlock || group_size % kMaxBlock == 0));
  STD_TORCH_CHECK(valid, "torch_int4: group_size must be a multiple of 32 up to 128, a multiple of 128 up to 1024, ",
                  "or -1, not ", group_size);
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "torch_int4: a weight needs at least one row and one input");
  PackedWeight w{};
  w.out_features = out_features;
  w.in_features = in_features;
  w.type = weight_type(type);
  w.book = find_codebook(type.c_str());
  w.padded_inputs = (in_features + kSlab - 1) / kSlab * kSlab;
  w.group = group_size == -1 || group_size > w.padded_inputs ? w.padded_inputs : group_size;
  w.groups = (w.padded_inputs + w.group - 1) / w.group;
  w.block = w.group < kMaxBlock ? w.group : kMaxBlock;
  w.blocks = (w.padded_inputs + w.block - 1) / w.block;
  return w;
}

// A packed weight over three tensors whose shapes and types were checked against each other.
PackedWeight view_weight(const Tensor& weight, const Tensor& scales, const OptionalTensor& offsets,
                         int64_t out_features, int64_t in_features, int64_t group_size, const std::string& type) {
  PackedWeight w = make_shape(out_features, in_features, group_size, type);
  check_tensor(weight, "weight", ScalarType::Byte, "uint8", {w.panels(), w.panel_bytes() / kLineBytes, kLineBytes});
  w.scale_type = scale_type(scales);
  const std::vector<int64_t> parameters{w.panels(), w.groups, kPanelRows};
  check_tensor(scales, "scales", scales.scalar_type(), "float16, float32 or uint8", parameters);
  w.offset = Offset::kSymmetric;
  if (offsets) {
    const bool integer = offsets->scalar_type() == ScalarType::Byte;
    w.offset = integer ? Offset::kInteger : Offset::kFloat;
    check_tensor(*offsets, "offsets", integer ? ScalarType::Byte : scales.scalar_type(),
                 "uint8 or of the type of the scales", parameters);
    w.offsets = offsets->const_data_ptr();
  }
  check_offset(w);
  w.codes = static_cast<const uint8_t*>(weight.const_data_ptr());
  w.scales = scales.const_data_ptr();
  return w;
}

const int64_t* check_perm(const OptionalTensor& perm, int64_t in_features) {
  if (!perm) return nullptr;
  check_tensor(*perm, "perm", ScalarType::Long, "int64", {in_features});
  const auto* p = static_cast<const int64_t*>(perm->const_data_ptr());
  int64_t inside = 1;
  for (int64_t k = 0; k < in_features; ++k) inside &= int64_t(p[k] >= 0) & int64_t(p[k] < in_features);
  STD_TORCH_CHECK(inside, "torch_int4: perm must hold indices from 0 to ", in_features - 1);
  return p;
}

using Packed = std::tuple<Tensor, Tensor, Tensor>;

Packed pack(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
            int64_t group_size, std::string type) {
  STD_TORCH_CHECK(codes.dim() == 2, "torch_int4: codes must be [out_features, in_features]");
  STD_TORCH_CHECK(!(zeros && offsets), "torch_int4: give zeros or offsets, not both");
  PackedWeight shape = make_shape(codes.size(0), codes.size(1), group_size, type);
  check_tensor(codes, "codes", ScalarType::Byte, "uint8", {shape.out_features, shape.in_features});
  const std::vector<int64_t> per_group{shape.out_features, shape.groups};
  shape.scale_type = scale_type(scales);
  shape.offset = zeros ? Offset::kInteger : offsets ? Offset::kFloat : Offset::kSymmetric;
  check_offset(shape);
  check_tensor(scales, "scales", scales.scalar_type(), "float16, float32 or uint8", per_group);
  if (zeros) check_tensor(*zeros, "zeros", ScalarType::Byte, "uint8", per_group);
  if (offsets) check_tensor(*offsets, "offsets", scales.scalar_type(), "of the type of the scales", per_group);
  const auto* data = static_cast<const uint8_t*>(codes.const_data_ptr());
  if (shape.type != WeightType::kInt8) {
    uint8_t seen = 0;
    for (int64_t i = 0; i < shape.out_features * shape.in_features; ++i) seen |= data[i];
    STD_TORCH_CHECK(seen < 16, "torch_int4: codes of a 4-bit weight must be from 0 to 15");
  }

  Tensor weight = torch::stable::new_empty(codes, {shape.panels(), shape.panel_bytes() / kLineBytes, kLineBytes});
  auto* packed = static_cast<uint8_t*>(weight.mutable_data_ptr());
  advise_huge_pages(packed, size_t(shape.panels() * shape.panel_bytes()));
  // The same split over threads as in linear(): each page is first touched by the thread that will read it.
  torch::stable::parallel_for(0, shape.panels(), 1,
                              [&](int64_t begin, int64_t end) { pack_codes(data, shape, begin, end, packed); });
  const std::vector<int64_t> streams{shape.panels(), shape.groups, kPanelRows};
  const auto pack_stream = [&](const Tensor& values) {
    Tensor stream = torch::stable::new_empty(values, streams);
    pack_parameters(values.const_data_ptr(), int(values.element_size()), shape, stream.mutable_data_ptr());
    return stream;
  };
  Tensor packed_offsets = zeros     ? pack_stream(*zeros)
                          : offsets ? pack_stream(*offsets)
                                    : torch::stable::new_empty(scales, {0});
  return {weight, pack_stream(scales), packed_offsets};
}

Packed unpack(const Tensor& weight, const Tensor& scales, const OptionalTensor& offsets, int64_t out_features,
              int64_t in_features, int64_t group_size, std::string type) {
  const PackedWeight w = view_weight(weight, scales, offsets, out_features, in_features, group_size, type);
  Tensor codes = torch::stable::new_empty(weight, {out_features, in_features});
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  torch::stable::parallel_for(0, w.panels(), 4,
                              [&](int64_t begin, int64_t end) { unpack_codes(w, begin, end, target); });
  const auto unpack_stream = [&](const Tensor& stream) {
    Tensor values = torch::stable::new_empty(stream, {out_features, w.groups});
    unpack_parameters(stream.const_data_ptr(), int(stream.element_size()), w, values.mutable_data_ptr());
    return values;
  };
  return {codes, unpack_stream(scales), offsets ? unpack_stream(*offsets) : torch::stable::new_empty(scales, {0})};
}

Tensor dequantize_op(const Tensor& weight, const Tensor& scales, const OptionalTensor& offsets,
                     const OptionalTensor& perm, int64_t out_features, int64_t in_features, int64_t group_size,
                     std::string type, ScalarType dtype) {
  const PackedWeight w = view_weight(weight, scales, offsets, out_features, in_features, group_size, type);
  const int64_t* order = check_perm(perm, in_features);
  const DType target_type = float_type(dtype, "dtype");
  Tensor target = torch::stable::new_empty(weight, {out_features, in_features}, dtype);
  void* data = target.mutable_data_ptr();
  torch::stable::parallel_for(0, w.panels(), 4,
                              [&](int64_t begin, int64_t end) { dequantize(w, begin, end, order, target_type, data); });
  return target;
}

// A bias as floats: the tensor's own memory, or `converted`, which is filled from another type.
const float* bias_floats(const OptionalTensor& bias, int64_t out_features, std::vector<float>& converted) {
  if (!bias) return nullptr;
  const DType dtype = float_type(bias->scalar_type(), "bias");
  check_tensor(*bias, "bias", bias->scalar_type(), "floating point", {out_features});
  if (dtype == DType::kF32) return static_cast<const float*>(bias->const_data_ptr());
  converted.resize(static_cast<size_t>(out_features));
  active_kernels().to_float(bias->const_data_ptr(), dtype, out_features, converted.data());
  return converted.data();
}

int64_t input_features(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "torch_int4: x must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= 1, "torch_int4: x must have at least one dimension");
  return x.size(x.dim() - 1);
}

// One or more weights applied to the same x.
std::vector<Tensor> apply(const Tensor& x, const std::vector<PackedWeight>& weights,
                          const std::vector<OptionalTensor>& biases, const OptionalTensor& perm,
                          const std::string& compute, std::optional<ScalarType> out_dtype) {
  const int64_t in_features = weights[0].in_features;
  const ScalarType y_type = out_dtype.value_or(x.scalar_type());
  const DType y_dtype = float_type(y_type, "out_dtype");
  const Tensor contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Input input{contiguous.const_data_ptr(), float_type(x.scalar_type(), "x"), x.numel() / in_features,
                    check_perm(perm, in_features)};
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<Tensor> results;
  std::vector<Output> outputs;
  std::vector<std::vector<float>> converted(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t out_features = shape.back() = weights[i].out_features;
    results.push_back(torch::stable::new_empty(x, shape, y_type));
    const float* bias = bias_floats(biases[i], out_features, converted[i]);
    outputs.push_back({results.back().mutable_data_ptr(), y_dtype, out_features, bias, 1});
  }
  const Compute how = compute_type(compute);
  if (input.rows) linear(weights.data(), outputs.data(), int(weights.size()), input, how, parallel);
  return results;
}

Tensor int4_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, const OptionalTensor& offsets,
                   const OptionalTensor& bias, const OptionalTensor& perm, int64_t out_features, int64_t group_size,
                   std::string type, std::string compute, std::optional<ScalarType> out_dtype) {
  const PackedWeight w = view_weight(weight, scales, offsets, out_features, input_features(x), group_size, type);
  return apply(x, {w}, {bias}, perm, compute, out_dtype)[0];
}

std::vector<Tensor> int4_linears(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                                 std::vector<OptionalTensor> offsets, std::vector<OptionalTensor> biases,
                                 const OptionalTensor& perm, std::vector<int64_t> out_features, int64_t group_size,
                                 std::string type, std::string compute, std::optional<ScalarType> out_dtype) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count && scales.size() == count && offsets.size() == count && biases.size() == count &&
                      out_features.size() == count,
                  "torch_int4: weights, scales, offsets, biases and out_features must be lists of one length");
  std::vector<PackedWeight> views;
  for (size_t i = 0; i < count; ++i) {
    views.push_back(
        view_weight(weights[i], scales[i], offsets[i], out_features[i], input_features(x), group_size, type));
  }
  return apply(x, views, biases, perm, compute, out_dtype);
}

Tensor codebook(std::string name) {
  const Codebook* book = find_codebook(name.c_str());
  STD_TORCH_CHECK(book, "torch_int4: there is no code book '", name, "'");
  Tensor values = torch::stable::empty({16}, ScalarType::Float);
  memcpy(values.mutable_data_ptr(), book->values, sizeof book->values);
  return values;
}

std::string isa() { return active_kernels().name; }

void set_isa(std::string name) { select_kernels(name); }

std::string isas(bool only_supported) {
  std::string text;
  for (const auto& name : kernel_names(only_supported)) text += (text.empty() ? "" : ",") + name;
  return text;
}

STABLE_TORCH_LIBRARY(torch_int4, m) {
  m.def(
      "pack(Tensor codes, Tensor scales, Tensor? zeros=None, Tensor? offsets=None, *, int group_size, "
      "str weight_type=\"int4\") -> (Tensor, Tensor, Tensor)");
  m.def(
      "unpack(Tensor weight, Tensor scales, Tensor? offsets, *, int out_features, int in_features, int group_size, "
      "str weight_type=\"int4\") -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize(Tensor weight, Tensor scales, Tensor? offsets, Tensor? perm, *, int out_features, int in_features, "
      "int group_size, str weight_type=\"int4\", ScalarType dtype=float) -> Tensor");
  m.def(
      "int4_linear(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? bias=None, "
      "Tensor? perm=None, *, int out_features, int group_size, str weight_type=\"int4\", str compute=\"int8\", "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int4_linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] offsets, Tensor?[] biases, "
      "Tensor? perm=None, *, int[] out_features, int group_size, str weight_type=\"int4\", str compute=\"int8\", "
      "ScalarType? out_dtype=None) -> Tensor[]");
  m.def("codebook(str name) -> Tensor");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("isas(bool only_supported) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_linears", TORCH_BOX(&int4_linears));
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("codebook", TORCH_BOX(&codebook));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("isas", TORCH_BOX(&isas));
}

}  // namespace
}  // namespace torch_int4

// The extension module only loads the library; everything is reached through torch.ops.
static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module_definition); }
