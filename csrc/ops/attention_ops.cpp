// Schemas of the operators of attention and every check of their arguments. LibTorch stable ABI only.
#include "ops/attention_views.h"

namespace torch_int4 {
namespace {

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_scales,
                    const OptionalTensor& value_scales, const OptionalTensor& length, const OptionalTensor& mask,
                    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double scale, bool causal,
                    int64_t window, double softcap) {
  Attention a{};
  a.query = view_heads(query, "query");
  a.batch = query.size(0);
  a.tokens = query.size(1);
  a.keys = view_keys(key, "key", key_scales, "key_scales");
  a.values = view_keys(value, "value", value_scales, "value_scales");
  a.kv_heads = key.size(1);
  a.type = cache_type(key, "key");
  check_same_type(value, "value", key, "key");
  check_same(key, "key", 0, a.batch, "the batch of query");
  check_same(key, "key", 3, a.query.dim, "the head size of query");
  for (int64_t d = 0; d < 3; ++d) check_same(value, "value", d, key.size(d), "that of key");
  STD_TORCH_CHECK(a.kv_heads > 0 && a.query.heads % a.kv_heads == 0, "torch_int4: query has ", a.query.heads,
                  " heads, which is not a multiple of the ", a.kv_heads, " heads of key");
  STD_TORCH_CHECK(key.size(2) <= kMaxKeys, "torch_int4: key holds more than ", kMaxKeys, " tokens");
  STD_TORCH_CHECK(window >= 0, "torch_int4: window must not be negative (0: none), not ", window);
  STD_TORCH_CHECK(softcap >= 0, "torch_int4: softcap must not be negative (0: none), not ", softcap);
  a.length = valid_keys(length, key.size(2));
  view_mask(mask, a);
  view_slopes(alibi_slopes, a);
  std::vector<float> converted;
  view_sinks(sinks, converted, a);
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.causal = causal;
  a.window = window < a.length ? window : 0;  // one that reaches all keys is none, and cannot overflow
  Tensor output = torch::stable::new_empty(query, {a.batch, a.tokens, a.query.heads, a.values.dim});
  a.output = output.mutable_data_ptr();
  attention(a, parallel);
  return output;
}

void view_states(const Tensor& query, const Tensor& key, const Tensor& value, RotaryAppend& a) {
  a.query = view_heads(query, "query");
  a.key = view_heads(key, "key");
  a.value = view_heads(value, "value");
  a.batch = query.size(0);
  a.tokens = query.size(1);
  check_same_type(key, "key", query, "query");
  check_same_type(value, "value", query, "query");
  for (int64_t d = 0; d < 2; ++d) {
    check_same(key, "key", d, query.size(d), "that of query");
    check_same(value, "value", d, query.size(d), "that of query");
  }
  check_same(key, "key", 3, a.query.dim, "the head size of query");
  check_same(value, "value", 2, a.key.heads, "the number of heads of key");
}

Tensor rotary_append_op(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cos,
                        const OptionalTensor& sin, const Caches& caches, int64_t rotary_dim, bool interleaved) {
  RotaryAppend a{};
  view_states(query, key, value, a);
  view_angles(cos, sin, rotary_dim, a);
  a.interleaved = interleaved;
  view_caches(caches, a);
  Tensor rotated = torch::stable::new_empty(query, {a.batch, a.tokens, a.query.heads, a.query.dim});
  a.rotated = rotated.mutable_data_ptr();
  if (a.batch * a.tokens > 0) rotary_append(a, parallel);
  *static_cast<int64_t*>(caches.length.mutable_data_ptr()) = a.length + a.tokens;
  return rotated;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(schema("rotary_append", "Tensor", "Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin",
               Caches::schema(), "*, int rotary_dim=0, bool interleaved=False")
            .c_str());
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? key_scales, Tensor? value_scales, Tensor? length, "
      "Tensor? mask, Tensor? alibi_slopes, Tensor? sinks=None, *, float scale, bool causal, int window=0, "
      "float softcap=0.) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("rotary_append", boxed<&rotary_append_op>);
  m.impl("attention", TORCH_BOX(&attention_op));
}

}  // namespace
}  // namespace torch_int4
