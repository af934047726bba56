// Schemas of the operators of a decoder layer around attention and every check of their arguments. LibTorch stable ABI
// only.
#include "framework/dispatch.h"
#include "ops/norms.h"

namespace torch_int4 {
namespace {

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

constexpr int64_t kThreadElements = 1 << 13;  // elements to normalize that are worth a thread

struct NormJob {
  Input x;
  int64_t features;
  char* output;
};

void normalize_rows(void* context, int64_t begin, int64_t end) {
  const NormJob& job = *static_cast<const NormJob*>(context);
  const IsaKernels& kernels = active_kernels();
  const int64_t bytes = job.features * element_bytes(job.x.dtype);
  std::vector<float> row(size_t(job.features));
  for (int64_t i = begin; i < end; ++i) {
    kernels.to_float(static_cast<const char*>(job.x.data) + i * bytes, job.x.dtype, job.features, row.data());
    kernels.normalize(row.data(), job.features, *job.x.norm, row.data());
    kernels.from_float(row.data(), job.features, job.x.dtype, false, job.output + i * bytes);
  }
}

Tensor normalize(const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias,
                 const NormOptions& options) {
  const int64_t features = input_features(x);
  STD_TORCH_CHECK(features, "torch_int4: x must have features");
  NormView view{};
  view_norm(x, features, norm_weight, norm_bias, options, view);
  const Tensor contiguous = make_contiguous(x);
  Tensor y = torch::stable::new_empty(x, output_shape(x, features));
  NormJob job{view_input(contiguous, features, std::nullopt), features, static_cast<char*>(y.mutable_data_ptr())};
  job.x.norm = &view.norm;
  parallel(job.x.rows, 1 + kThreadElements / features, normalize_rows, &job);
  return y;
}

std::vector<Tensor> norm_linears(const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                 const LinearsTensors& linears, const OptionalTensor& perm,
                                 const LinearsOptions& options, std::optional<ScalarType> out_dtype,
                                 const NormOptions& norm) {
  const std::vector<PackedWeight> views = view_weights(linears, options, input_features(x));
  NormView view{};
  view_norm(x, input_features(x), norm_weight, norm_bias, norm, view);
  return apply(x, views, linears.biases, perm, options.compute, out_dtype, &view.norm);
}

Tensor linear_add(const Tensor& x, const Tensor& residual, const LinearTensors& linear, const LinearOptions& options) {
  const PackedWeight w = view_weight(linear.weight, options.out_features, input_features(x), options.weight);
  const Tensor contiguous = make_contiguous(residual, "residual");
  const void* added = view_residual(contiguous, x, options.out_features);
  return apply(x, {w}, {linear.bias}, linear.perm, options.compute, std::nullopt, nullptr, added)[0];
}

Tensor mlp_op(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& norm_weight,
              const OptionalTensor& norm_bias, const LinearsTensors& linears, const OptionalTensor& perm,
              const OptionalTensor& down_perm, const LinearsOptions& options, const std::string& activation,
              const NormOptions& norm) {
  const size_t count = linears.count();
  const std::vector<int64_t>& out_features = options.out_features;
  STD_TORCH_CHECK((count == 2 || count == 3) && linears.scales.size() == count && linears.offsets.size() == count &&
                      linears.biases.size() == count && out_features.size() == count,
                  "torch_int4: weights, scales, offsets, biases and out_features must be lists of three (gate, up and "
                  "down) or of two (up and down)");
  STD_TORCH_CHECK(norm_weight || !norm_bias, "torch_int4: norm_bias needs a norm_weight");
  Mlp m{};
  m.gated = count == 3;
  STD_TORCH_CHECK(!m.gated || out_features[0] == out_features[1], "torch_int4: gate has ", out_features[0],
                  " out_features but up has ", out_features[1]);
  std::vector<float> converted[3];
  for (size_t i = 0; i < count; ++i) {
    const int64_t inputs = i + 1 < count ? input_features(x) : out_features[0];
    m.weights[i] = view_weight(linears.weight(i), out_features[i], inputs, options.weight(i));
    m.biases[i] = bias_floats(linears.biases[i], out_features[i], converted[i]);
  }
  const Tensor contiguous = make_contiguous(x);
  m.x = view_input(contiguous, input_features(x), perm);
  NormView view{};
  if (norm_weight) {
    view_norm(x, input_features(x), *norm_weight, norm_bias, norm, view);
    m.x.norm = &view.norm;
  }
  m.down_perm = check_perm(down_perm, out_features[0]);
  m.activation = activation_type(activation, m.gated);
  const Compute how = compute_type(options.compute);
  const int64_t features = out_features[count - 1];
  const Tensor added = residual ? make_contiguous(*residual, "residual") : x;
  const void* residual_data = residual ? view_residual(added, x, features) : nullptr;
  Tensor y = torch::stable::new_empty(x, output_shape(x, features));
  m.output = {y.mutable_data_ptr(), m.x.dtype, features, nullptr, 1, residual_data};
  if (m.x.rows) mlp(m, how, parallel);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(schema("normalize", "Tensor", "Tensor x, Tensor norm_weight, Tensor? norm_bias=None, *", NormOptions::schema())
            .c_str());
  m.def(schema("norm_linears", "Tensor[]", "Tensor x, Tensor norm_weight, Tensor? norm_bias", LinearsTensors::schema(),
               "Tensor? perm=None, *", LinearsOptions::schema(), "ScalarType? out_dtype=None", NormOptions::schema())
            .c_str());
  m.def(
      schema("linear_add", "Tensor", "Tensor x, Tensor residual", LinearTensors::schema(), "*", LinearOptions::schema())
          .c_str());
  m.def(schema("mlp", "Tensor", "Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias",
               LinearsTensors::schema(), "Tensor? perm=None, Tensor? down_perm=None, *", LinearsOptions::schema(),
               "str activation=\"silu\"", NormOptions::schema())
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("normalize", boxed<&normalize>);
  m.impl("norm_linears", boxed<&norm_linears>);
  m.impl("linear_add", boxed<&linear_add>);
  m.impl("mlp", boxed<&mlp_op>);
}

}  // namespace
}  // namespace torch_int4
