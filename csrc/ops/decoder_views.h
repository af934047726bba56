// A decoder layer as operators get it: every check of its arguments, in two parts. LibTorch stable ABI only.
#pragma once
#include "framework/decoder.h"
#include "ops/attention_views.h"
#include "ops/norms.h"

namespace torch_int4 {

// A tensor's place in its storage when it was prepared, and the size of both.
struct Extent {
  int64_t offset, count, stored;  // elements, elements, bytes
};

struct LinearExtents {
  Extent codes, scales, offsets;
};

// The part of a layer that stays the same from call to call, checked, with the tensors that it views. Norms, biases and
// permutations are checked at each call: they may have been written to. Each call also checks that the other tensors
// still have their memory.
struct PreparedLayer {
  LayerTensors tensors;
  LayerOptions options;
  DecoderLayer layer{};
  LinearExtents extents[kMaxLinears];
};

// The arguments of one call, besides x.
struct LayerState {
  const OptionalTensor &cos, &sin;
  Caches caches;
  const OptionalTensor& mask;
};

// Sizes of the heads that a layer writes to its caches.
struct HeadSizes {
  int64_t kv_heads, key, value;
};

// Checks a layer and fills in all that does not depend on x and the caches but for `features`, the last size of x.
void prepare_layer(PreparedLayer& p, int64_t features, const HeadSizes& heads);

// A prepared layer as one call runs it.
struct LayerView {
  DecoderLayer layer;
  NormView norms[4];  // as `converted`, kept from call to call
  std::vector<float> converted[kMaxLinears];
};

// Checks everything that a call brings, for y = layer(x), both [batch, tokens, features] and contiguous, in memory of
// their own. The view holds none of it: all of it must live until the layer ran. It must not be called for one view
// from two threads at once, nor for one length twice before it ran.
void view_layer(const PreparedLayer& p, const Tensor& x, const LayerState& state, int64_t rotary_dim, double scale,
                double softcap, Tensor& y, LayerView& view);

// Runs what was viewed, and adds its tokens to the length.
void run_layer(LayerView& view, const Tensor& length);

}  // namespace torch_int4
