#include "ops/decoder_views.h"

namespace torch_int4 {
namespace {

void check_counts(const LayerTensors& given, const LayerOptions& options) {
  const LinearsTensors& linears = given.linears;
  const int64_t projections = options.projections;
  STD_TORCH_CHECK(projections == 1 || projections == 3,
                  "torch_int4: projections must be 1 (query, key and value in "
                  "one) or 3, not ",
                  projections);
  const size_t count = linears.count(), others = size_t(projections) + 1;
  STD_TORCH_CHECK(count == others + 2 || count == others + 3, "torch_int4: a layer with ", projections,
                  " projections has ", others + 2, " linears, or ", others + 3, " with a gate; weights has ", count);
  STD_TORCH_CHECK(linears.scales.size() == count && linears.offsets.size() == count && linears.biases.size() == count &&
                      given.perms.size() == count && options.linears.out_features.size() == count,
                  "torch_int4: weights, scales, offsets, biases, perms and out_features must be lists of one length");
  const size_t norms = given.norm_weights.size();
  STD_TORCH_CHECK(given.norm_biases.size() == norms && (norms == 2 || (norms == 1 && options.parallel_residual)),
                  "torch_int4: norm_weights and norm_biases must be lists of two, or of one with parallel_residual");
  STD_TORCH_CHECK(given.head_norms.empty() || given.head_norms.size() == 2,
                  "torch_int4: head_norms must be empty, or a list of two weights: for queries and for keys");
}

void check_features(int64_t got, int64_t expected, const char* linear, const char* what) {
  STD_TORCH_CHECK(got == expected, "torch_int4: the ", linear, " has ", got, " out_features but ", what, " needs ",
                  expected);
}

// Heads by the sizes of the caches, and that the projections give as many.
void view_heads(const HeadSizes& heads, const std::vector<int64_t>& features, DecoderLayer& l) {
  const auto [kv_heads, dim, value_dim] = heads;
  STD_TORCH_CHECK(kv_heads > 0 && dim > 0 && value_dim > 0, "torch_int4: key_cache and value_cache must not be empty");
  STD_TORCH_CHECK(dim <= kMaxHeadSize && value_dim <= kMaxHeadSize, "torch_int4: heads of ", dim, " and ", value_dim,
                  " features are too large; each must be at most ", kMaxHeadSize);
  const int64_t key_features = product(kv_heads, dim, "key_cache"),
                value_features = product(kv_heads, value_dim, "value_cache");
  RotaryAppend& r = l.rotary;
  r.key.heads = r.value.heads = kv_heads;
  r.query.dim = r.key.dim = dim;
  r.value.dim = value_dim;
  if (l.projections == 1) {
    STD_TORCH_CHECK(dim == value_dim, "torch_int4: keys and values of one projection must have one head size");
    r.query.heads = features[0] / dim - kv_heads - kv_heads;
    check_features(features[0], features[0] / dim * dim, "projection", "a whole number of heads");
  } else {
    r.query.heads = features[0] / dim;
    check_features(features[0], features[0] / dim * dim, "query projection", "a whole number of heads");
    check_features(features[1], key_features, "key projection", "the key_cache");
    check_features(features[2], value_features, "value projection", "the value_cache");
  }
  STD_TORCH_CHECK(r.query.heads > 0 && r.query.heads % kv_heads == 0, "torch_int4: there are ", r.query.heads,
                  " query heads, which is not a multiple of the ", kv_heads, " heads of key_cache");
}

void view_linears(const PreparedLayer& p, int64_t features, DecoderLayer& l) {
  const std::vector<int64_t>& out_features = p.options.linears.out_features;
  const int output = l.projections, count = int(p.tensors.linears.count()), down = count - 1;
  l.gated = count == output + 4;
  for (int i = 0; i < count; ++i) {
    const int64_t inputs = i == output ? product(l.rotary.query.heads, l.rotary.value.dim, "the output projection")
                           : i == down ? out_features[size_t(down) - 1]
                                       : features;
    const auto n = size_t(i);
    l.weights[i] = view_weight(p.tensors.linears.weight(n), out_features[n], inputs, p.options.linears.weight(n));
    l.perms[i] = check_perm(p.tensors.perms[n], inputs);
  }
  check_features(l.weights[output].out_features, features, "output projection", "the residual");
  check_features(l.weights[down].out_features, features, "down projection", "the residual");
  if (l.gated) check_features(l.weights[down - 2].out_features, l.weights[down - 1].out_features, "gate", "up");
}

// The same caches, as attention reads them.
void view_attended(const Caches& given, DecoderLayer& l) {
  const RotaryAppend& r = l.rotary;
  STD_TORCH_CHECK(r.capacity <= kMaxKeys, "torch_int4: key_cache holds more than ", kMaxKeys, " tokens");
  l.attention.type = r.type;
  l.attention.keys = view_keys(given.keys, "key_cache", given.key_scales, "key_scales");
  l.attention.values = view_keys(given.values, "value_cache", given.value_scales, "value_scales");
  l.attention.kv_heads = r.key.heads;
  l.attention.length = r.length + r.tokens;
}

// Few questions, as each asks LibTorch: from the same place on, in a storage of the same size, lie the bytes that were
// checked.
bool is_at(const Tensor& t, const void* data, const Extent& extent) {
  return t.const_data_ptr() == data && t.storage_offset() == extent.offset && t.numel() == extent.count &&
         stored_bytes(t) == extent.stored;
}

Extent extent_of(const Tensor& t) { return {t.storage_offset(), t.numel(), stored_bytes(t)}; }

LinearExtents extents_of(const LinearsTensors& given, size_t i) {
  const OptionalTensor& offsets = given.offsets[i];
  return {extent_of(given.codes[i]), extent_of(given.scales[i]), offsets ? extent_of(*offsets) : Extent{}};
}

// The memory of a linear. Tensors keep their identity when they get another storage, type or shape (share_memory_(),
// t.data = ..., t.set_(...), a storage that is resized): those are looked at from the start.
void view_memory(const PreparedLayer& p, size_t i, PackedWeight& w) {
  const LinearsTensors& given = p.tensors.linears;
  const LinearExtents& extents = p.extents[i];
  const OptionalTensor& offsets = given.offsets[i];
  if (is_at(given.codes[i], w.codes, extents.codes) && is_at(given.scales[i], w.scales, extents.scales) &&
      (!offsets || is_at(*offsets, w.offsets, extents.offsets))) {
    return;
  }
  w = view_weight(given.weight(i), w.out_features, w.in_features, p.options.linears.weight(i));
}

// Biases and permutations are checked at each call: both may be written to, and the latter are where kernels read.
void view_memory(const PreparedLayer& p, DecoderLayer& l, std::vector<float>* converted) {
  const LayerTensors& given = p.tensors;
  const size_t count = given.linears.count(), output = size_t(l.projections);
  for (size_t i = 0; i < count; ++i) {
    PackedWeight& w = l.weights[i];
    view_memory(p, i, w);
    l.biases[i] = bias_floats(given.linears.biases[i], w.out_features, converted[i]);
    const bool read = i == 0 || i == output || i == output + 1 || i == count - 1;  // those of other linears are alike
    l.perms[i] = read ? check_perm(given.perms[i], w.in_features) : nullptr;
  }
}

void view_norms(const PreparedLayer& p, const Tensor& x, NormView* norms, DecoderLayer& l) {
  const LayerTensors& given = p.tensors;
  const NormOptions& options = p.options.norm;
  const int64_t features = l.weights[0].in_features;
  for (size_t i = 0; i < given.norm_weights.size(); ++i) {
    view_norm(x, features, given.norm_weights[i], given.norm_biases[i], options, norms[i]);
  }
  for (size_t i = 0; i < given.head_norms.size(); ++i) {
    view_norm(x, l.rotary.query.dim, given.head_norms[i], std::nullopt, options, norms[2 + i]);
    (i == 0 ? l.rotary.query_norm : l.rotary.key_norm) = &norms[2 + i].norm;
  }
  l.x.norm = &norms[0].norm;
  l.mlp_norm = &norms[given.norm_weights.size() - 1].norm;
}

}  // namespace

void prepare_layer(PreparedLayer& p, int64_t features, const HeadSizes& heads) {
  check_counts(p.tensors, p.options);
  DecoderLayer& l = p.layer;
  l.projections = int(p.options.projections);
  l.parallel = p.options.parallel_residual;
  view_heads(heads, p.options.linears.out_features, l);
  view_linears(p, features, l);
  for (size_t i = 0; i < p.tensors.linears.count(); ++i) p.extents[i] = extents_of(p.tensors.linears, i);
  l.compute = compute_type(p.options.linears.compute);
  l.activation = activation_type(p.options.activation, l.gated);
  l.rotary.interleaved = p.options.interleaved;
}

void view_layer(const PreparedLayer& p, const Tensor& x, const LayerState& state, int64_t rotary_dim, double scale,
                double softcap, Tensor& y, LayerView& view) {
  DecoderLayer& l = view.layer = p.layer;
  l.rotary.batch = l.attention.batch = x.size(0);
  l.rotary.tokens = l.attention.tokens = x.size(1);
  const int64_t features = l.weights[0].in_features;
  STD_TORCH_CHECK(input_features(x) == features, "torch_int4: x has shape ", shape_text(x), " but the layer takes ",
                  features, " features");
  l.x = view_input(x, features, std::nullopt);
  int64_t inside = features;  // features of all that is kept between the steps of a layer
  for (const int64_t n : p.options.linears.out_features) inside += n;
  product(product(l.x.rows, 4, "x"), inside, "x");
  view_memory(p, l, view.converted);
  l.x.perm = l.perms[0];
  view_norms(p, x, view.norms, l);
  view_angles(state.cos, state.sin, rotary_dim, l.rotary);
  view_caches(state.caches, l.rotary);
  view_attended(state.caches, l);
  l.attention.query.heads = l.rotary.query.heads;
  view_mask(state.mask, l.attention);
  STD_TORCH_CHECK(softcap >= 0, "torch_int4: softcap must not be negative (0: none), not ", softcap);
  l.attention.scale = float(scale);
  l.attention.softcap = float(softcap);
  l.attention.causal = !state.mask;
  l.output = y.mutable_data_ptr();
}

void run_layer(LayerView& view, const Tensor& length) {
  DecoderLayer& l = view.layer;
  if (l.x.rows) decoder_layer(l, parallel);
  *static_cast<int64_t*>(length.mutable_data_ptr()) += l.rotary.tokens;
}

}  // namespace torch_int4
