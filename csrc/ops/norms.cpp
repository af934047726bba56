#include "ops/norms.h"

namespace torch_int4 {

Activation activation_type(const std::string& name, bool gated) {
  static const std::pair<const char*, Activation> known[] = {
      {"silu", Activation::kSilu}, {"gelu", Activation::kGelu},   {"gelu_tanh", Activation::kGeluTanh},
      {"relu", Activation::kRelu}, {"relu2", Activation::kRelu2}, {"clamped_swiglu", Activation::kClampedSwiglu},
  };
  std::string names;
  for (const auto& [text, activation] : known) {
    STD_TORCH_CHECK(name != text || gated || activation != Activation::kClampedSwiglu,
                    "torch_int4: activation 'clamped_swiglu' needs a gate and an up");
    if (name == text) return activation;
    names += (names.empty() ? "'" : ", '") + std::string(text) + "'";
  }
  STD_TORCH_CHECK(false, "torch_int4: activation must be one of ", names, ", not '", name, "'");
}

static const float* parameter_floats(const Tensor& t, const char* name, const Tensor& x, int64_t count,
                                     std::vector<float>& converted) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "torch_int4: ", name, " and x must have one dtype");
  check_tensor(t, name, t.scalar_type(), "floating point", {count});
  return floats_of(t, name, converted);
}

void view_norm(const Tensor& x, int64_t count, const Tensor& weight, const OptionalTensor& bias,
               const NormOptions& options, NormView& view) {
  const auto& [kind, eps, offset] = options;
  const bool rms = kind == "rms" || kind == "rms_once";
  STD_TORCH_CHECK(rms || kind == "layer", "torch_int4: norm must be 'rms', 'rms_once' or 'layer', not '", kind, "'");
  STD_TORCH_CHECK(eps >= 0, "torch_int4: eps must not be negative, not ", eps);
  view.norm.kind = !rms ? Norm::kLayer : kind == "rms" ? Norm::kRms : Norm::kRmsOnce;
  STD_TORCH_CHECK(!bias || !rms, "torch_int4: only norm='layer' has a norm_bias");
  STD_TORCH_CHECK(offset == 0 || rms, "torch_int4: norm='layer' has no norm_offset");
  view.norm.dtype = float_type(x.scalar_type(), "x");
  view.norm.eps = float(eps);
  view.norm.offset = float(offset);
  view.norm.weight = parameter_floats(weight, "norm_weight", x, count, view.weight);
  view.norm.bias = bias ? parameter_floats(*bias, "norm_bias", x, count, view.bias) : nullptr;
}

}  // namespace torch_int4
