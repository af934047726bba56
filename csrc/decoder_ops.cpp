// Schema of the operator of a whole decoder layer and every check of its arguments. LibTorch stable ABI only.
#include "attention_views.h"
#include "decoder.h"
#include "norms.h"

namespace torch_int4 {
namespace {

// The linears of a layer as they are given, lists of one length.
struct Linears {
  const std::vector<Tensor>&weights, &scales;
  const std::vector<OptionalTensor>&offsets, &biases, &perms;
  const std::vector<int64_t>& out_features;
  int64_t group_size;
  const std::string& type;
};

void check_counts(const Linears& given, int64_t projections) {
  const size_t count = given.weights.size(), others = size_t(projections) + 1;
  STD_TORCH_CHECK(projections == 1 || projections == 3,
                  "torch_int4: projections must be 1 (query, key and value in "
                  "one) or 3, not ",
                  projections);
  STD_TORCH_CHECK(count == others + 2 || count == others + 3, "torch_int4: a layer with ", projections,
                  " projections has ", others + 2, " linears, or ", others + 3, " with a gate; weights has ", count);
  STD_TORCH_CHECK(given.scales.size() == count && given.offsets.size() == count && given.biases.size() == count &&
                      given.perms.size() == count && given.out_features.size() == count,
                  "torch_int4: weights, scales, offsets, biases, perms and out_features must be lists of one length");
}

void check_features(int64_t got, int64_t expected, const char* linear, const char* what) {
  STD_TORCH_CHECK(got == expected, "torch_int4: the ", linear, " has ", got, " out_features but ", what, " needs ",
                  expected);
}

// Heads by the shapes of the caches, and that the projections give as many.
void view_heads_of_caches(const Tensor& key_cache, const Tensor& value_cache, const Linears& given, DecoderLayer& l) {
  check_view(key_cache, "key_cache", 4);
  check_view(value_cache, "value_cache", 4);
  const int64_t kv_heads = key_cache.size(1), dim = key_cache.size(3), value_dim = value_cache.size(3);
  STD_TORCH_CHECK(kv_heads > 0 && dim > 0 && value_dim > 0, "torch_int4: key_cache and value_cache must not be empty");
  RotaryAppend& r = l.rotary;
  r.key.heads = r.value.heads = kv_heads;
  r.query.dim = r.key.dim = dim;
  r.value.dim = value_dim;
  const auto& features = given.out_features;
  if (l.projections == 1) {
    STD_TORCH_CHECK(dim == value_dim, "torch_int4: keys and values of one projection must have one head size");
    r.query.heads = features[0] / dim - 2 * kv_heads;
    check_features(features[0], (r.query.heads + 2 * kv_heads) * dim, "projection", "a whole number of heads");
  } else {
    r.query.heads = features[0] / dim;
    check_features(features[0], r.query.heads * dim, "query projection", "a whole number of heads");
    check_features(features[1], kv_heads * dim, "key projection", "the key_cache");
    check_features(features[2], kv_heads * value_dim, "value projection", "the value_cache");
  }
  STD_TORCH_CHECK(r.query.heads > 0 && r.query.heads % kv_heads == 0, "torch_int4: there are ", r.query.heads,
                  " query heads, which is not a multiple of the ", kv_heads, " heads of key_cache");
}

void view_linears(const Linears& given, int64_t features, DecoderLayer& l, std::vector<float>* converted) {
  const int output = l.projections, count = int(given.weights.size()), down = count - 1;
  l.gated = count == output + 4;
  for (int i = 0; i < count; ++i) {
    const int64_t inputs = i == output ? l.rotary.query.heads * l.rotary.value.dim
                           : i == down ? given.out_features[size_t(down) - 1]
                                       : features;
    const auto n = size_t(i);
    l.weights[i] = view_weight(given.weights[n], given.scales[n], given.offsets[n], given.out_features[n], inputs,
                               given.group_size, given.type);
    l.biases[i] = bias_floats(given.biases[n], given.out_features[n], converted[i]);
    l.perms[i] = check_perm(given.perms[n], inputs);
  }
  check_features(l.weights[output].out_features, features, "output projection", "the residual");
  check_features(l.weights[down].out_features, features, "down projection", "the residual");
  if (l.gated) check_features(l.weights[down - 2].out_features, l.weights[down - 1].out_features, "gate", "up");
}

void view_caches(const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& key_scales,
                 const OptionalTensor& value_scales, const Tensor& length, DecoderLayer& l) {
  RotaryAppend& r = l.rotary;
  r.type = l.attention.type = cache_type(key_cache, "key_cache");
  check_same_type(value_cache, "value_cache", key_cache, "key_cache");
  r.key_cache = view_cache(key_cache, "key_cache", key_scales, "key_scales", r.key, r);
  r.value_cache = view_cache(value_cache, "value_cache", value_scales, "value_scales", r.value, r);
  r.capacity = key_cache.size(2);
  check_same(value_cache, "value_cache", 2, r.capacity, "the capacity of key_cache");
  STD_TORCH_CHECK(r.capacity <= kMaxKeys, "torch_int4: key_cache holds more than ", kMaxKeys, " tokens");
  check_length(length);
  r.length = *static_cast<const int64_t*>(length.const_data_ptr());
  STD_TORCH_CHECK(r.length >= 0 && r.length + r.tokens <= r.capacity, "torch_int4: the cache holds ", r.length, " of ",
                  r.capacity, " tokens (its capacity); ", r.tokens, " more do not fit. Use a larger cache");
  l.attention.keys = view_keys(key_cache, "key_cache", key_scales, "key_scales");
  l.attention.values = view_keys(value_cache, "value_cache", value_scales, "value_scales");
  l.attention.kv_heads = r.key.heads;
  l.attention.length = r.length + r.tokens;
}

Tensor decoder_layer_op(const Tensor& x, std::vector<Tensor> norm_weights, std::vector<OptionalTensor> norm_biases,
                        std::vector<Tensor> head_norms, std::vector<Tensor> weights, std::vector<Tensor> scales,
                        std::vector<OptionalTensor> offsets, std::vector<OptionalTensor> biases,
                        std::vector<OptionalTensor> perms, const OptionalTensor& cos, const OptionalTensor& sin,
                        const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& key_scales,
                        const OptionalTensor& value_scales, const Tensor& length, const OptionalTensor& mask,
                        std::vector<int64_t> out_features, int64_t group_size, std::string type, std::string compute,
                        std::string activation, std::string norm, double eps, double norm_offset, int64_t projections,
                        bool parallel_residual, int64_t rotary_dim, bool interleaved, double scale, double softcap) {
  const Linears given{weights, scales, offsets, biases, perms, out_features, group_size, type};
  check_counts(given, projections);
  STD_TORCH_CHECK(x.dim() == 3, "torch_int4: x must be [batch, tokens, features], not ", shape_text(x));
  STD_TORCH_CHECK(norm_biases.size() == norm_weights.size() &&
                      (norm_weights.size() == 2 || (norm_weights.size() == 1 && parallel_residual)),
                  "torch_int4: norm_weights and norm_biases must be lists of two, or of one with parallel_residual");
  const Tensor contiguous = make_contiguous(x);
  const int64_t features = input_features(x);
  DecoderLayer l{};
  l.rotary.batch = l.attention.batch = x.size(0);
  l.rotary.tokens = l.attention.tokens = x.size(1);
  l.projections = int(projections);
  l.parallel = parallel_residual;
  l.x = view_input(contiguous, features, std::nullopt);
  view_heads_of_caches(key_cache, value_cache, given, l);
  std::vector<float> converted[kMaxLinears];
  view_linears(given, features, l, converted);
  l.x.perm = l.perms[0];
  STD_TORCH_CHECK(head_norms.empty() || head_norms.size() == 2,
                  "torch_int4: head_norms must be empty, or a list of two weights: for queries and for keys");
  NormView norms[4] = {};
  for (size_t i = 0; i < norm_weights.size(); ++i) {
    view_norm(x, features, norm_weights[i], norm_biases[i], norm, eps, norm_offset, norms[i]);
  }
  for (size_t i = 0; i < head_norms.size(); ++i) {
    view_norm(x, l.rotary.query.dim, head_norms[i], std::nullopt, norm, eps, norm_offset, norms[2 + i]);
    (i == 0 ? l.rotary.query_norm : l.rotary.key_norm) = &norms[2 + i].norm;
  }
  l.x.norm = &norms[0].norm;
  l.mlp_norm = &norms[norm_weights.size() - 1].norm;
  l.compute = compute_type(compute);
  l.activation = activation_type(activation);
  l.rotary.interleaved = interleaved;
  view_angles(cos, sin, rotary_dim, l.rotary);
  view_caches(key_cache, value_cache, key_scales, value_scales, length, l);
  l.attention.query.heads = l.rotary.query.heads;
  view_mask(mask, l.attention);
  STD_TORCH_CHECK(softcap >= 0, "torch_int4: softcap must not be negative (0: none), not ", softcap);
  l.attention.scale = float(scale);
  l.attention.softcap = float(softcap);
  l.attention.causal = !mask;
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), features});
  l.output = y.mutable_data_ptr();
  if (l.x.rows) decoder_layer(l, parallel);
  *static_cast<int64_t*>(length.mutable_data_ptr()) += l.rotary.tokens;
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(
      "decoder_layer(Tensor x, Tensor[] norm_weights, Tensor?[] norm_biases, Tensor[] head_norms, Tensor[] weights, "
      "Tensor[] scales, "
      "Tensor?[] offsets, Tensor?[] biases, Tensor?[] perms, Tensor? cos, Tensor? sin, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor(c!)? key_scales, Tensor(d!)? value_scales, Tensor(e!) length, "
      "Tensor? mask=None, *, int[] out_features, int group_size, str weight_type=\"int4\", str compute=\"int8\", "
      "str activation=\"silu\", str norm=\"rms\", float eps=1e-6, float norm_offset=0., int projections=3, "
      "bool parallel_residual=False, int rotary_dim=0, bool interleaved=False, float scale, float softcap=0.) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer_op)); }

}  // namespace
}  // namespace torch_int4
