// Queries, keys, masks, angles and caches as operators get them: checks of the tensors, and views of their memory.
#pragma once
#include "framework/attention.h"
#include "ops/nouns.h"

namespace torch_int4 {

constexpr int64_t kMaxKeys = int64_t(1) << 24;  // key indices are exact as floats

constexpr int64_t kMaxHeadSize = int64_t(1) << 16;

// A CPU tensor of so many dimensions, the last of stride 1, with its memory.
void check_view(const Tensor& t, const char* name, int64_t dims);
void check_same(const Tensor& t, const char* name, int64_t dim, int64_t expected, const char* what);
void check_same_type(const Tensor& t, const char* name, const Tensor& other, const char* other_name);

CacheType cache_type(const Tensor& t, const char* name);
HeadsView view_heads(const Tensor& t, const char* name);
KeysView view_keys(const Tensor& t, const char* name, const OptionalTensor& scales, const char* scales_name);

// The number of valid keys among `keys`: the value of the tensor `length`, or all.
int64_t valid_keys(const OptionalTensor& length, int64_t keys);

// These fill in their part of `a`, whose batch, tokens, query and length are there already.
void view_mask(const OptionalTensor& mask, Attention& a);
void view_slopes(const OptionalTensor& slopes, Attention& a);
void view_sinks(const OptionalTensor& sinks, std::vector<float>& converted, Attention& a);
void view_angles(const OptionalTensor& cos, const OptionalTensor& sin, int64_t rotary_dim, RotaryAppend& a);

// The caches that take the keys and values of `a`, whose batch, tokens and heads are there already.
void view_caches(const Caches& given, RotaryAppend& a);

}  // namespace torch_int4
