#include "ops/weights.h"

#include "framework/dispatch.h"
#include "framework/types.h"

namespace torch_int4 {
namespace {

constexpr int64_t kMaxGroup = 1024;
constexpr int64_t kMaxFeatures = (int64_t(1) << 31) - 1;  // so that products of sizes fit in 64 bits

const NamedType& weight_type(const std::string& name) {
  const NamedType* found = find_type(name);
  STD_TORCH_CHECK(found, "torch_int4: weight_type must be one of ", type_names(), "; not '", name, "'");
  return *found;
}

}  // namespace

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

Offset offset_of_records(const Tensor& scales) {
  if (scales.scalar_type() != ScalarType::Byte || scales.dim() != 3) return Offset::kSymmetric;
  for (const Offset offset : {Offset::kTwoLevel, Offset::kTwoLevelScale, Offset::kTwoLevelHalves}) {
    if (scales.size(2) == record_bytes(offset)) return offset;
  }
  return Offset::kSymmetric;
}

std::vector<int64_t> records_shape(const PackedWeight& w) {
  return {w.panels(), w.padded_inputs / kRecordInputs, int64_t(record_bytes(w.offset))};
}

void check_offset(const PackedWeight& w) {
  if (has_records(w.offset)) {
    const int group = w.offset == Offset::kTwoLevelHalves ? kHalf : kSlab;
    STD_TORCH_CHECK(w.group == group && w.in_features % kRecordInputs == 0,
                    "torch_int4: scales of two levels with such records need groups of ", group,
                    " inputs, and in_features that are a multiple of ", kRecordInputs);
  } else {
    STD_TORCH_CHECK(w.group != kHalf, "torch_int4: groups of ", kHalf, " inputs need scales of two levels");
  }
  STD_TORCH_CHECK(are_served(w.type, w.offset), "torch_int4: no kernel has this kind of ",
                  has_records(w.offset) ? "scales of two levels" : "offsets", " for this weight_type");
  STD_TORCH_CHECK(w.scale_type != ScaleType::kE8M0 || w.offset != Offset::kFloat,
                  "torch_int4: float offsets need float scales");
}

PackedWeight make_shape(int64_t out_features, int64_t in_features, int64_t group_size, const std::string& type) {
  const bool valid = group_size == -1 || group_size == kHalf ||
                     (group_size > 0 && group_size <= kMaxGroup && group_size % kSlab == 0 &&
                      (group_size <= kMaxBlock || group_size % kMaxBlock == 0));
  STD_TORCH_CHECK(valid, "torch_int4: group_size must be a multiple of 32 up to 128, a multiple of 128 up to 1024, ",
                  "or -1, not ", group_size);
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "torch_int4: a weight needs at least one row and one input");
  STD_TORCH_CHECK(out_features <= kMaxFeatures && in_features <= kMaxFeatures, "torch_int4: a weight of ", out_features,
                  " out_features and ", in_features, " in_features is too large; each must be at most ", kMaxFeatures);
  PackedWeight w{};
  w.out_features = out_features;
  w.in_features = in_features;
  const NamedType& named = weight_type(type);
  w.type = named.type;
  w.book = named.book;
  w.padded_inputs = (in_features + kSlab - 1) / kSlab * kSlab;
  w.group = group_size == -1 || group_size > w.padded_inputs ? w.padded_inputs : group_size;
  w.groups = (w.padded_inputs + w.group - 1) / w.group;
  w.block = w.group < kMaxBlock ? w.group : kMaxBlock;
  w.blocks = (w.padded_inputs + w.block - 1) / w.block;
  return w;
}

PackedWeight view_weight(const WeightTensors& given, int64_t out_features, int64_t in_features,
                         const WeightOptions& options) {
  PackedWeight w = make_shape(out_features, in_features, options.group_size, options.type);
  const Tensor& scales = given.scales;
  check_tensor(given.codes, "weight", ScalarType::Byte, "uint8",
               {w.panels(), w.panel_bytes() / kLineBytes, kLineBytes});
  w.codes = static_cast<const uint8_t*>(given.codes.const_data_ptr());
  w.scales = scales.const_data_ptr();
  w.offset = offset_of_records(scales);
  if (has_records(w.offset)) {
    check_offset(w);
    STD_TORCH_CHECK(!given.offsets, "torch_int4: scales of two levels hold the offsets; give no others");
    check_tensor(scales, "scales", ScalarType::Byte, "uint8", records_shape(w));
    w.scale_type = ScaleType::kF16;
    return w;
  }
  w.scale_type = scale_type(scales);
  const std::vector<int64_t> parameters{w.panels(), w.groups, kPanelRows};
  check_tensor(scales, "scales", scales.scalar_type(), "float16, float32 or uint8", parameters);
  if (given.offsets) {
    const bool integer = given.offsets->scalar_type() == ScalarType::Byte;
    w.offset = integer ? Offset::kInteger : Offset::kFloat;
    check_tensor(*given.offsets, "offsets", integer ? ScalarType::Byte : scales.scalar_type(),
                 "uint8 or of the type of the scales", parameters);
    w.offsets = given.offsets->const_data_ptr();
  }
  check_offset(w);
  return w;
}

const int64_t* check_perm(const OptionalTensor& perm, int64_t in_features) {
  if (!perm) return nullptr;
  check_tensor(*perm, "perm", ScalarType::Long, "int64", {in_features});
  const auto* p = static_cast<const int64_t*>(perm->const_data_ptr());
  const auto last = uint64_t(in_features - 1);
  uint64_t signs = 0;  // of every index and of its distance to the last; loops without compares take half the time
  for (int64_t k = 0; k < in_features; ++k) signs |= uint64_t(p[k]) | (last - uint64_t(p[k]));
  STD_TORCH_CHECK(!(signs >> 63), "torch_int4: perm must hold indices from 0 to ", in_features - 1);
  return p;
}

const float* floats_of(const Tensor& t, const char* name, std::vector<float>& converted) {
  const DType dtype = float_type(t.scalar_type(), name);
  if (dtype == DType::kF32) return static_cast<const float*>(t.const_data_ptr());
  converted.resize(static_cast<size_t>(t.numel()));
  active_kernels().to_float(t.const_data_ptr(), dtype, t.numel(), converted.data());
  return converted.data();
}

const float* bias_floats(const OptionalTensor& bias, int64_t out_features, std::vector<float>& converted) {
  if (!bias) return nullptr;
  float_type(bias->scalar_type(), "bias");
  check_tensor(*bias, "bias", bias->scalar_type(), "floating point", {out_features});
  return floats_of(*bias, "bias", converted);
}

int64_t input_features(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "torch_int4: x must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= 1, "torch_int4: x must have at least one dimension");
  return x.size(x.dim() - 1);
}

std::vector<PackedWeight> view_weights(const LinearsTensors& given, const LinearsOptions& options,
                                       int64_t in_features) {
  const size_t count = given.count();
  STD_TORCH_CHECK(count && given.scales.size() == count && given.offsets.size() == count &&
                      given.biases.size() == count && options.out_features.size() == count,
                  "torch_int4: weights, scales, offsets, biases and out_features must be lists of one length");
  std::vector<PackedWeight> views;
  for (size_t i = 0; i < count; ++i) {
    views.push_back(view_weight(given.weight(i), options.out_features[i], in_features, options.weight(i)));
  }
  return views;
}

Input view_input(const Tensor& contiguous, int64_t in_features, const OptionalTensor& perm) {
  return {contiguous.const_data_ptr(), float_type(contiguous.scalar_type(), "x"), contiguous.numel() / in_features,
          check_perm(perm, in_features)};
}

std::vector<Tensor> apply(const Tensor& x, const std::vector<PackedWeight>& weights,
                          const std::vector<OptionalTensor>& biases, const OptionalTensor& perm,
                          const std::string& compute, std::optional<ScalarType> out_dtype, const RowNorm* norm,
                          const void* residual) {
  const ScalarType y_type = out_dtype.value_or(x.scalar_type());
  const DType y_dtype = float_type(y_type, "out_dtype");
  const Tensor contiguous = make_contiguous(x);
  Input input = view_input(contiguous, weights[0].in_features, perm);
  input.norm = norm;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<Tensor> results;
  std::vector<Output> outputs;
  std::vector<std::vector<float>> converted(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t out_features = shape.back() = weights[i].out_features;
    results.push_back(torch::stable::new_empty(x, shape, y_type));
    const float* bias = bias_floats(biases[i], out_features, converted[i]);
    outputs.push_back({results.back().mutable_data_ptr(), y_dtype, out_features, bias, 1, residual});
  }
  const Compute how = compute_type(compute);
  if (input.rows) linear(weights.data(), outputs.data(), int(weights.size()), input, how, parallel);
  return results;
}

}  // namespace torch_int4
