#include "ops/attention_views.h"

#include "ops/weights.h"

namespace torch_int4 {

static void check_layout(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu(), "torch_int4: ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dims, "torch_int4: ", name, " must have ", dims, " dimensions, not the shape ",
                  shape_text(t));
  STD_TORCH_CHECK(t.size(dims - 1) == 1 || t.stride(dims - 1) == 1 || t.numel() == 0,
                  "torch_int4: the last dimension of ", name, " must have stride 1; call .contiguous()");
}

void check_view(const Tensor& t, const char* name, int64_t dims) {
  check_layout(t, name, dims);
  check_stored(t, name);
}

static void check_head_size(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(3) <= kMaxHeadSize, "torch_int4: ", name, " has heads of ", t.size(3),
                  " features, which is more than ", kMaxHeadSize);
}

HeadsView view_heads(const Tensor& t, const char* name) {
  check_view(t, name, 4);
  check_head_size(t, name);
  return {t.const_data_ptr(), float_type(t.scalar_type(), name), t.size(2), t.size(3), t.stride(0), t.stride(1),
          t.stride(2)};
}

void check_same(const Tensor& t, const char* name, int64_t dim, int64_t expected, const char* what) {
  STD_TORCH_CHECK(t.size(dim) == expected, "torch_int4: ", name, " has shape ", shape_text(t), " but ", what, " is ",
                  expected);
}

namespace {

// A dimension of size 1 is broadcast.
int64_t broadcast_stride(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

void check_broadcast(const Tensor& t, const char* name, int64_t dim, int64_t expected, const char* what) {
  if (t.size(dim) != 1) check_same(t, name, dim, expected, what);
}

}  // namespace

CacheType cache_type(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Char) return CacheType::kInt8;
  if (t.scalar_type() == ScalarType::Float) return CacheType::kF32;
  if (t.scalar_type() == ScalarType::BFloat16) return CacheType::kBF16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "torch_int4: ", name,
                  " must be float32, bfloat16, float16 or int8");
  return CacheType::kF16;
}

void check_same_type(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), "torch_int4: ", name, " and ", other_name,
                  " must have one dtype");
}

// int8 needs scales, [batch, kv_heads, keys]; the other types have none.
static void check_scales(const OptionalTensor& scales, const char* name, const Tensor& keys) {
  const bool needed = keys.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(needed == scales.has_value(), "torch_int4: ", name,
                  needed ? " must be given for an int8 cache" : " must be None unless the cache is int8");
  if (!needed) return;
  check_view(*scales, name, 3);
  STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float, "torch_int4: ", name, " must be float32");
  for (int64_t d = 0; d < 3; ++d) check_same(*scales, name, d, keys.size(d), "the size of the cache");
}

static void check_length(const Tensor& length) { check_tensor(length, "length", ScalarType::Long, "int64", {1}); }

KeysView view_keys(const Tensor& t, const char* name, const OptionalTensor& scales, const char* scales_name) {
  check_view(t, name, 4);
  check_head_size(t, name);
  check_scales(scales, scales_name, t);
  KeysView view{t.const_data_ptr(), t.size(3), t.stride(0), t.stride(1), t.stride(2), nullptr, 0, 0};
  if (scales) {
    view.scales = static_cast<const float*>(scales->const_data_ptr());
    view.scale_batch_stride = scales->stride(0);
    view.scale_head_stride = scales->stride(1);
  }
  return view;
}

int64_t valid_keys(const OptionalTensor& length, int64_t keys) {
  if (!length) return keys;
  check_length(*length);
  const int64_t n = *static_cast<const int64_t*>(length->const_data_ptr());
  STD_TORCH_CHECK(n >= 0 && n <= keys, "torch_int4: length is ", n, " but key holds ", keys, " tokens");
  return n;
}

void view_mask(const OptionalTensor& mask, Attention& a) {
  if (!mask) return;
  check_view(*mask, "mask", 4);
  check_broadcast(*mask, "mask", 0, a.batch, "the batch");
  check_broadcast(*mask, "mask", 1, a.query.heads, "the number of heads");
  check_broadcast(*mask, "mask", 2, a.tokens, "the number of query tokens");
  STD_TORCH_CHECK(mask->size(3) >= a.length, "torch_int4: mask has shape ", shape_text(*mask), " but needs ", a.length,
                  " columns, one per key");
  const ScalarType type = mask->scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Bool || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "torch_int4: mask must be bool (True attends), float32, bfloat16 or float16 (added)");
  a.mask_type = type == ScalarType::Bool       ? MaskType::kBool
                : type == ScalarType::Float    ? MaskType::kF32
                : type == ScalarType::BFloat16 ? MaskType::kBF16
                                               : MaskType::kF16;
  a.mask = mask->const_data_ptr();
  a.mask_batch_stride = broadcast_stride(*mask, 0);
  a.mask_head_stride = broadcast_stride(*mask, 1);
  a.mask_token_stride = broadcast_stride(*mask, 2);
}

void view_slopes(const OptionalTensor& slopes, Attention& a) {
  if (!slopes) return;
  const bool per_batch = slopes->dim() == 2;
  const std::vector<int64_t> shape =
      per_batch ? std::vector<int64_t>{a.batch, a.query.heads} : std::vector<int64_t>{a.query.heads};
  check_tensor(*slopes, "alibi_slopes", ScalarType::Float, "float32", shape);
  a.slopes = static_cast<const float*>(slopes->const_data_ptr());
  a.slope_batch_stride = per_batch ? a.query.heads : 0;
}

void view_sinks(const OptionalTensor& sinks, std::vector<float>& converted, Attention& a) {
  if (!sinks) return;
  check_tensor(*sinks, "sinks", sinks->scalar_type(), "floating point", {a.query.heads});
  a.sinks = floats_of(*sinks, "sinks", converted);
}

void view_angles(const OptionalTensor& cos, const OptionalTensor& sin, int64_t rotary_dim, RotaryAppend& a) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value() && cos.has_value() == (rotary_dim > 0),
                  "torch_int4: cos and sin go with a positive rotary_dim, and without one both are None");
  if (!cos) return;
  STD_TORCH_CHECK(rotary_dim % 2 == 0 && rotary_dim <= a.query.dim, "torch_int4: rotary_dim must be even and at most ",
                  a.query.dim, ", the head size, not ", rotary_dim);
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>(*cos, "cos"), {*sin, "sin"}}) {
    check_view(t, name, 3);
    check_broadcast(t, name, 0, a.batch, "the batch");
    check_same(t, name, 1, a.tokens, "the number of tokens");
    STD_TORCH_CHECK(t.size(2) == rotary_dim || t.size(2) == rotary_dim / 2, "torch_int4: ", name, " has shape ",
                    shape_text(t), " but its last size must be rotary_dim or half of it, with rotary_dim ", rotary_dim);
  }
  check_same_type(*sin, "sin", *cos, "cos");
  a.rotary_dim = rotary_dim;
  a.angle_type = float_type(cos->scalar_type(), "cos");
  a.cos = cos->const_data_ptr();
  a.sin = sin->const_data_ptr();
  a.cos_batch_stride = broadcast_stride(*cos, 0);
  a.cos_token_stride = cos->stride(1);
  a.sin_batch_stride = broadcast_stride(*sin, 0);
  a.sin_token_stride = sin->stride(1);
}

namespace {

// The tokens that `length` says are in a cache, where so many more fit.
int64_t check_room(const Tensor& length, int64_t tokens, int64_t capacity) {
  check_length(length);
  const int64_t held = *static_cast<const int64_t*>(length.const_data_ptr());
  // Not held + tokens, which may be beyond the largest number.
  STD_TORCH_CHECK(held >= 0 && held <= capacity - tokens, "torch_int4: length says that the cache holds ", held, " of ",
                  capacity, " tokens (its capacity); ", tokens, " more do not fit. Use a larger cache");
  return held;
}

// A cache that takes keys or values like `source`.
CacheTarget view_cache(const Tensor& cache, const char* name, const OptionalTensor& scales, const char* scales_name,
                       const HeadsView& source, const RotaryAppend& a) {
  check_layout(cache, name, 4);
  check_tensor(cache, name, cache.scalar_type(), "float32, bfloat16, float16 or int8",
               {a.batch, source.heads, cache.size(2), source.dim});
  check_scales(scales, scales_name, cache);
  if (!scales) return {cache.mutable_data_ptr(), nullptr};
  STD_TORCH_CHECK(scales->is_contiguous(), "torch_int4: ", scales_name, " must be contiguous");
  return {cache.mutable_data_ptr(), static_cast<float*>(scales->mutable_data_ptr())};
}

}  // namespace

void view_caches(const Caches& given, RotaryAppend& a) {
  a.type = cache_type(given.keys, "key_cache");
  check_same_type(given.values, "value_cache", given.keys, "key_cache");
  a.key_cache = view_cache(given.keys, "key_cache", given.key_scales, "key_scales", a.key, a);
  a.value_cache = view_cache(given.values, "value_cache", given.value_scales, "value_scales", a.value, a);
  a.capacity = given.keys.size(2);
  check_same(given.values, "value_cache", 2, a.capacity, "the capacity of key_cache");
  a.length = check_room(given.length, a.tokens, a.capacity);
}

}  // namespace torch_int4
