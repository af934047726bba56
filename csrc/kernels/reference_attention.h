// Attention in plain scalar code: the oracle of loops/attention.h. Part of reference.cpp.
#pragma once
#include <math.h>

#include "kernels/attention_kernel.h"
#include "kernels/scalar.h"

namespace torch_int4 {
namespace {

void from_float(const float* source, int64_t count, DType dtype, bool clamp, void* target) {
  for (int64_t i = 0; i < count; ++i) {
    float x = source[i];
    if (clamp && dtype == DType::kF16) x = x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x;
    store_element(target, dtype, i, x);
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved) {
  for (int64_t j = 0; j < dim / 2; ++j) {
    float& first = x[interleaved ? 2 * j : j];
    float& second = x[interleaved ? 2 * j + 1 : j + dim / 2];
    const float a = first, b = second;
    first = a * cos[j] - b * sin[j];
    second = b * cos[j] + a * sin[j];
  }
}

float cache_element(CacheType type, const void* data, int64_t i) {
  if (type == CacheType::kInt8) return float(static_cast<const int8_t*>(data)[i]);
  return load_element(data,
                      type == CacheType::kF32    ? DType::kF32
                      : type == CacheType::kBF16 ? DType::kBF16
                                                 : DType::kF16,
                      i);
}

// The number that the mask adds to the score of a key; the lowest number of its type hides the key.
float mask_bias(const AttentionRow& row, MaskType type, int64_t key) {
  if (type == MaskType::kNone) return 0;
  if (type == MaskType::kBool) return static_cast<const uint8_t*>(row.mask)[key] ? 0 : -INFINITY;
  const DType dtype = type == MaskType::kF32 ? DType::kF32 : type == MaskType::kBF16 ? DType::kBF16 : DType::kF16;
  const float bias = load_element(row.mask, dtype, key);
  const float lowest = dtype == DType::kF16 ? -65504.f : dtype == DType::kBF16 ? -3.3895314e38f : -3.402823466e38f;
  return bias <= lowest ? -INFINITY : bias;
}

float score(const AttentionTile& t, int r, int64_t key) {
  const float* query = t.query + r * padded_lanes(t.dim);
  float s = 0;
  for (int64_t d = 0; d < t.dim; ++d) s += query[d] * cache_element(t.type, t.keys, key * t.key_stride + d);
  if (t.key_scales) s *= t.key_scales[key];
  if (t.softcap > 0) s = t.softcap * tanhf(s / t.softcap);
  return s + t.row[r].slope * float(key);
}

// Keys one by one; a key above the largest score so far shrinks the sums before it.
void attend(const AttentionTile& t) {
  for (int r = 0; r < t.rows; ++r) {
    const AttentionRow& row = t.row[r];
    float* sums = t.sums + r * padded_lanes(t.value_dim);
    for (int64_t d = 0; d < padded_lanes(t.value_dim); ++d) sums[d] = 0;
    float largest = -INFINITY, total = 0;
    for (int64_t key = t.begin; key < t.end; ++key) {
      if (key < row.first || key >= row.last) continue;
      const float bias = mask_bias(row, t.mask_type, key);
      if (bias == -INFINITY) continue;
      const float s = score(t, r, key) + bias;
      const float before = largest;
      if (s > largest) largest = s;
      const float base = largest == -INFINITY ? 0 : largest;
      const float weight = expf(s - base), shrink = before == largest ? 1 : expf(before - base);
      total = total * shrink + weight;
      const float scaled = t.value_scales ? weight * t.value_scales[key] : weight;
      for (int64_t d = 0; d < t.value_dim; ++d) {
        sums[d] = sums[d] * shrink + scaled * cache_element(t.type, t.values, key * t.value_stride + d);
      }
    }
    t.largest[r] = largest;
    t.total[r] = total;
  }
}

}  // namespace
}  // namespace torch_int4
