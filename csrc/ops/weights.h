// Packed weights and their inputs as operators get them: checks of the tensors, and the product.
#pragma once
#include "ops/nouns.h"

namespace torch_int4 {

ScaleType scale_type(const Tensor& scales);
Compute compute_type(const std::string& name);

// The offsets of a weight whose scales are a stream of records, by the size of these; else kSymmetric.
Offset offset_of_records(const Tensor& scales);

// The shape of such a stream.
std::vector<int64_t> records_shape(const PackedWeight& w);

// That loops exist for a weight's type and offsets, its groups, and its scales.
void check_offset(const PackedWeight& w);

// The shape of a weight, without its data. A short K makes the group shorter; -1 is one group per row.
PackedWeight make_shape(int64_t out_features, int64_t in_features, int64_t group_size, const std::string& type);

// A packed weight over three tensors whose shapes and types were checked against each other.
PackedWeight view_weight(const WeightTensors& given, int64_t out_features, int64_t in_features,
                         const WeightOptions& options);

// Several weights with the same inputs.
std::vector<PackedWeight> view_weights(const LinearsTensors& given, const LinearsOptions& options, int64_t in_features);

const int64_t* check_perm(const OptionalTensor& perm, int64_t in_features);

// A parameter as floats: the tensor's own memory, or `converted`, which is filled from another type.
const float* floats_of(const Tensor& t, const char* name, std::vector<float>& converted);
const float* bias_floats(const OptionalTensor& bias, int64_t out_features, std::vector<float>& converted);

// The last size of x, which must be a CPU tensor.
int64_t input_features(const Tensor& x);

inline Tensor make_contiguous(const Tensor& t, const char* name = "x") {
  check_stored(t, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Input view_input(const Tensor& contiguous, int64_t in_features, const OptionalTensor& perm);

// One or more weights applied to the same x, which may be normalized first; `residual` is added to the result.
std::vector<Tensor> apply(const Tensor& x, const std::vector<PackedWeight>& weights,
                          const std::vector<OptionalTensor>& biases, const OptionalTensor& perm,
                          const std::string& compute, std::optional<ScalarType> out_dtype,
                          const RowNorm* norm = nullptr, const void* residual = nullptr);

}  // namespace torch_int4
