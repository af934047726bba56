// The framework around the kernels of attention: rows to tiles, keys to spans, masks, merging; and of the cache:
// rotation, rounding, appending. No ATen and no intrinsics, so that the same code also runs in plain test programs.
#pragma once
#include "framework/linear.h"
#include "kernels/attention_kernel.h"

namespace torch_int4 {

// [batch][token][head][dim] with any strides but that of the last, which is 1. Strides count elements.
struct HeadsView {
  const void* data;
  DType dtype;
  int64_t heads, dim;
  int64_t batch_stride, token_stride, head_stride;
  int64_t group = 0, group_stride = 0;  // heads in groups of so many, so far apart; 0: all are head_stride apart
};

// Keys or values, [batch][kv_head][key][dim], the last stride 1.
struct KeysView {
  const void* data;
  int64_t dim;
  int64_t batch_stride, head_stride, key_stride;
  const float* scales;  // [batch][kv_head][key], the last stride 1; of int8, else null
  int64_t scale_batch_stride, scale_head_stride;
};

struct Attention {
  int64_t batch, tokens, kv_heads, length;  // length: keys that are valid
  HeadsView query;
  CacheType type;
  KeysView keys, values;
  MaskType mask_type;
  const void* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_token_stride;  // 0 where the mask is broadcast
  const float* slopes;                                             // [batch or 1][heads], or null
  int64_t slope_batch_stride;
  const float* sinks;  // [heads], or null
  float scale, softcap;
  bool causal;
  int64_t window;  // 0: none
  void* output;    // [batch][token][head][value_dim], of the query's type
};

void attention(const Attention& a, ParallelFor parallel);

// One of the two caches, [batch][kv_head][capacity][dim].
struct CacheTarget {
  void* data;
  float* scales;  // [batch][kv_head][capacity] of int8, else null
};

struct RotaryAppend {
  int64_t batch, tokens, capacity, length;  // length: tokens in the cache before
  HeadsView query, key, value;
  const void *cos, *sin;  // [batch or 1][token][...], or null
  DType angle_type;
  int64_t cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride;
  int64_t rotary_dim;
  bool interleaved;
  CacheType type;
  CacheTarget key_cache, value_cache;
  void* rotated;                                             // the query, [batch][token][head][dim]
  const RowNorm *query_norm = nullptr, *key_norm = nullptr;  // of each head, before the rotation
};

void rotary_append(const RotaryAppend& a, ParallelFor parallel);

}  // namespace torch_int4
