// Schemas of the operators of a decoder layer around attention and every check of their arguments. LibTorch stable ABI
// only.
#include "weights.h"

namespace torch_int4 {
namespace {

Activation activation_type(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "torch_int4: activation must be 'silu', 'gelu' or 'gelu_tanh', not '", name,
                  "'");
  return Activation::kGeluTanh;
}

// A norm, and the memory of its parameters where they are not floats.
struct NormView {
  RowNorm norm;
  std::vector<float> weight, bias;
};

const float* parameter_floats(const Tensor& t, const char* name, const Tensor& x, std::vector<float>& converted) {
  const int64_t count = input_features(x);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "torch_int4: ", name, " and x must have one dtype");
  check_tensor(t, name, t.scalar_type(), "floating point", {count});
  return floats_of(t, name, converted);
}

void view_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const std::string& kind, double eps,
               double offset, NormView& view) {
  STD_TORCH_CHECK(kind == "rms" || kind == "layer", "torch_int4: norm must be 'rms' or 'layer', not '", kind, "'");
  STD_TORCH_CHECK(eps >= 0, "torch_int4: eps must not be negative, not ", eps);
  view.norm.kind = kind == "rms" ? Norm::kRms : Norm::kLayer;
  STD_TORCH_CHECK(!bias || view.norm.kind == Norm::kLayer, "torch_int4: only norm='layer' has a norm_bias");
  STD_TORCH_CHECK(offset == 0 || view.norm.kind == Norm::kRms, "torch_int4: only norm='rms' has a norm_offset");
  view.norm.dtype = float_type(x.scalar_type(), "x");
  view.norm.eps = float(eps);
  view.norm.offset = float(offset);
  view.norm.weight = parameter_floats(weight, "norm_weight", x, view.weight);
  view.norm.bias = bias ? parameter_floats(*bias, "norm_bias", x, view.bias) : nullptr;
}

std::vector<int64_t> output_shape(const Tensor& x, int64_t out_features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  return shape;
}

// The memory of a residual that has the shape and the dtype of the result.
const void* view_residual(const Tensor& residual, const Tensor& x, int64_t out_features) {
  check_tensor(residual, "residual", x.scalar_type(), "of the dtype of x", output_shape(x, out_features));
  return residual.const_data_ptr();
}

std::vector<Tensor> norm_linears(const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                 std::vector<Tensor> weights, std::vector<Tensor> scales,
                                 std::vector<OptionalTensor> offsets, std::vector<OptionalTensor> biases,
                                 const OptionalTensor& perm, std::vector<int64_t> out_features, int64_t group_size,
                                 std::string type, std::string compute, std::optional<ScalarType> out_dtype,
                                 std::string norm, double eps, double norm_offset) {
  const std::vector<PackedWeight> views =
      view_weights(weights, scales, offsets, biases, out_features, input_features(x), group_size, type);
  NormView view{};
  view_norm(x, norm_weight, norm_bias, norm, eps, norm_offset, view);
  return apply(x, views, biases, perm, compute, out_dtype, &view.norm);
}

Tensor linear_add(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& scales,
                  const OptionalTensor& offsets, const OptionalTensor& bias, const OptionalTensor& perm,
                  int64_t out_features, int64_t group_size, std::string type, std::string compute) {
  const PackedWeight w = view_weight(weight, scales, offsets, out_features, input_features(x), group_size, type);
  const Tensor contiguous = make_contiguous(residual);
  return apply(x, {w}, {bias}, perm, compute, std::nullopt, nullptr, view_residual(contiguous, x, out_features))[0];
}

Tensor gated_mlp_op(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& norm_weight,
                    const OptionalTensor& norm_bias, std::vector<Tensor> weights, std::vector<Tensor> scales,
                    std::vector<OptionalTensor> offsets, std::vector<OptionalTensor> biases, const OptionalTensor& perm,
                    const OptionalTensor& down_perm, std::vector<int64_t> out_features, int64_t group_size,
                    std::string type, std::string compute, std::string activation, std::string norm, double eps,
                    double norm_offset) {
  STD_TORCH_CHECK(weights.size() == 3 && scales.size() == 3 && offsets.size() == 3 && biases.size() == 3 &&
                      out_features.size() == 3,
                  "torch_int4: weights, scales, offsets, biases and out_features must be lists of three: gate, up "
                  "and down");
  STD_TORCH_CHECK(out_features[0] == out_features[1], "torch_int4: gate has ", out_features[0],
                  " out_features but up has ", out_features[1]);
  STD_TORCH_CHECK(norm_weight || !norm_bias, "torch_int4: norm_bias needs a norm_weight");
  GatedMlp mlp{};
  std::vector<float> converted[3];
  for (size_t i = 0; i < 3; ++i) {
    const int64_t inputs = i < 2 ? input_features(x) : out_features[0];
    mlp.weights[i] = view_weight(weights[i], scales[i], offsets[i], out_features[i], inputs, group_size, type);
    mlp.biases[i] = bias_floats(biases[i], out_features[i], converted[i]);
  }
  const Tensor contiguous = make_contiguous(x);
  mlp.x = view_input(contiguous, input_features(x), perm);
  NormView view{};
  if (norm_weight) {
    view_norm(x, *norm_weight, norm_bias, norm, eps, norm_offset, view);
    mlp.x.norm = &view.norm;
  }
  mlp.down_perm = check_perm(down_perm, out_features[0]);
  mlp.activation = activation_type(activation);
  const Compute how = compute_type(compute);
  const Tensor added = residual ? make_contiguous(*residual) : x;
  const void* residual_data = residual ? view_residual(added, x, out_features[2]) : nullptr;
  Tensor y = torch::stable::new_empty(x, output_shape(x, out_features[2]));
  mlp.output = {y.mutable_data_ptr(), mlp.x.dtype, out_features[2], nullptr, 1, residual_data};
  if (mlp.x.rows) gated_mlp(mlp, how, parallel);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(
      "norm_linears(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] scales, "
      "Tensor?[] offsets, Tensor?[] biases, Tensor? perm=None, *, int[] out_features, int group_size, "
      "str weight_type=\"int4\", str compute=\"int8\", ScalarType? out_dtype=None, str norm=\"rms\", float eps=1e-6, "
      "float norm_offset=0.) -> Tensor[]");
  m.def(
      "linear_add(Tensor x, Tensor residual, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? bias=None, "
      "Tensor? perm=None, *, int out_features, int group_size, str weight_type=\"int4\", str compute=\"int8\") "
      "-> Tensor");
  m.def(
      "gated_mlp(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, "
      "Tensor[] scales, Tensor?[] offsets, Tensor?[] biases, Tensor? perm=None, Tensor? down_perm=None, *, "
      "int[] out_features, int group_size, str weight_type=\"int4\", str compute=\"int8\", str activation=\"silu\", "
      "str norm=\"rms\", float eps=1e-6, float norm_offset=0.) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("norm_linears", TORCH_BOX(&norm_linears));
  m.impl("linear_add", TORCH_BOX(&linear_add));
  m.impl("gated_mlp", TORCH_BOX(&gated_mlp_op));
}

}  // namespace
}  // namespace torch_int4
