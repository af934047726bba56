// Schemas of the operators of a sparse layer's experts and every check of their arguments. LibTorch stable ABI only.
#include <utility>

#include "framework/experts.h"
#include "ops/norms.h"
#include "ops/registry.h"

namespace torch_int4 {
namespace {

// Experts with their tensors, which the views point into.
struct PreparedExperts {
  LinearsTensors linears;  // of each expert its gate, up and down, or its up and down
  std::vector<OptionalTensor> perms;
  std::vector<std::vector<float>> converted;  // biases of other types
  std::vector<Expert> experts;
  int64_t in_features, out_features;
  bool gated;
  Activation activation;
  Compute compute;
};

void check_lists(const LinearsTensors& linears, const std::vector<OptionalTensor>& perms, size_t each) {
  const size_t count = linears.count();
  STD_TORCH_CHECK(each == 2 || each == 3,
                  "torch_int4: out_features must be those of gate, up and down, or of up and down");
  STD_TORCH_CHECK(count && count % each == 0, "torch_int4: experts of ", each, " linears cannot have ", count,
                  " weights");
  STD_TORCH_CHECK(linears.scales.size() == count && linears.offsets.size() == count && linears.biases.size() == count,
                  "torch_int4: weights, scales, offsets and biases must be lists of one length");
  STD_TORCH_CHECK(perms.size() == count / each * 2, "torch_int4: perms must be a list of two for each expert");
}

std::shared_ptr<PreparedExperts> view_experts(const LinearsTensors& linears, const std::vector<OptionalTensor>& perms,
                                              int64_t in_features, const LinearsOptions& options,
                                              const std::string& activation) {
  const size_t each = options.out_features.size();
  check_lists(linears, perms, each);
  auto p = std::make_shared<PreparedExperts>(
      PreparedExperts{linears, perms, std::vector<std::vector<float>>(linears.count()), {}, in_features});
  p->gated = each == 3;
  const int64_t inner = options.out_features[0];
  STD_TORCH_CHECK(!p->gated || inner == options.out_features[1], "torch_int4: gate has ", inner,
                  " out_features but up has ", options.out_features[1]);
  p->out_features = options.out_features[each - 1];
  p->activation = activation_type(activation, p->gated);
  p->compute = compute_type(options.compute);
  for (size_t i = 0; i < linears.count() / each; ++i) {
    Expert expert{};
    for (size_t j = 0; j < each; ++j) {
      const size_t at = i * each + j;
      const int64_t inputs = j + 1 < each ? in_features : inner;
      expert.weights[j] = view_weight(p->linears.weight(at), options.out_features[j], inputs, options.weight(j));
      expert.biases[j] = bias_floats(p->linears.biases[at], options.out_features[j], p->converted[at]);
    }
    STD_TORCH_CHECK(!p->gated || expert.weights[0].block == expert.weights[1].block,
                    "torch_int4: gate and up must take x in blocks of one length, as groups of one size have them");
    expert.perm = check_perm(p->perms[2 * i], in_features);
    expert.down_perm = check_perm(p->perms[2 * i + 1], inner);
    p->experts.push_back(expert);
  }
  return p;
}

// The experts that a router chose for each row: indices up to the number of experts, which stands for none.
const int64_t* check_chosen(const Tensor& chosen, int64_t rows, int64_t count) {
  STD_TORCH_CHECK(chosen.dim() == 2 && chosen.size(1) > 0,
                  "torch_int4: chosen must be [rows, experts of a row], at least one, not ", shape_text(chosen));
  check_tensor(chosen, "chosen", ScalarType::Long, "int64", {rows, chosen.size(1)});
  const auto* data = static_cast<const int64_t*>(chosen.const_data_ptr());
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= count, "torch_int4: chosen has expert ", data[i], " of ", count);
  }
  return data;
}

Tensor apply_experts(const PreparedExperts& p, const Tensor& x, const Tensor& chosen, const Tensor& shares) {
  STD_TORCH_CHECK(input_features(x) == p.in_features, "torch_int4: experts take ", p.in_features,
                  " features, but x has shape ", shape_text(x));
  const Tensor contiguous = make_contiguous(x), indices = make_contiguous(chosen, "chosen");
  const Tensor parts = make_contiguous(shares, "shares");
  Experts e{};
  e.x = view_input(contiguous, p.in_features, std::nullopt);
  e.experts = p.experts.data();
  e.count = int64_t(p.experts.size());
  e.gated = p.gated;
  e.activation = p.activation;
  e.chosen = check_chosen(indices, e.x.rows, e.count);
  e.top_k = indices.size(1);
  float_type(parts.scalar_type(), "shares");
  check_tensor(parts, "shares", parts.scalar_type(), "floating point", {e.x.rows, e.top_k});
  std::vector<float> converted;
  e.shares = floats_of(parts, "shares", converted);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  e.output = y.mutable_data_ptr();
  if (e.x.rows) run_experts(e, p.compute, parallel);
  return y;
}

Tensor experts_op(const Tensor& x, const Tensor& chosen, const Tensor& shares, const LinearsTensors& linears,
                  std::vector<OptionalTensor> perms, const LinearsOptions& options, const std::string& activation) {
  return apply_experts(*view_experts(linears, perms, input_features(x), options, activation), x, chosen, shares);
}

Registry<PreparedExperts>& registry() {
  static auto* const all = new Registry<PreparedExperts>;  // never destroyed: torch may be gone before its tensors
  return *all;
}

int64_t prepare_op(const LinearsTensors& linears, std::vector<OptionalTensor> perms, int64_t in_features,
                   const LinearsOptions& options, const std::string& activation) {
  return registry().add(view_experts(linears, perms, in_features, options, activation));
}

Tensor prepared_op(const Tensor& x, const Tensor& chosen, const Tensor& shares, int64_t experts,
                   int64_t /*out_features*/) {
  return apply_experts(*registry().find(experts, "experts"), x, chosen, shares);
}

void release_op(int64_t experts) { registry().remove(experts); }

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(schema("experts", "Tensor", "Tensor x, Tensor chosen, Tensor shares", LinearsTensors::schema(),
               "Tensor?[] perms, *", LinearsOptions::schema(), "str activation=\"silu\"")
            .c_str());
  m.def(schema("prepare_experts", "int", LinearsTensors::schema(), "Tensor?[] perms, *, int in_features",
               LinearsOptions::schema(), "str activation=\"silu\"")
            .c_str());
  m.def("prepared_experts(Tensor x, Tensor chosen, Tensor shares, int experts, int out_features) -> Tensor");
  m.def("release_experts(int experts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("experts", boxed<&experts_op>);
  m.impl("prepare_experts", boxed<&prepare_op>);
  m.impl("prepared_experts", boxed<&prepared_op>);
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("release_experts", TORCH_BOX(&release_op));
}

}  // namespace
}  // namespace torch_int4
