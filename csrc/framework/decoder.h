// A whole decoder layer, put together from the framework functions: norm, projections, rotation into the cache,
// attention, output projection and sum, norm, MLP and sum.
#pragma once
#include "framework/attention.h"
#include "framework/linear.h"

namespace torch_int4 {

constexpr int kMaxLinears = 7;

struct DecoderLayer {
  Input x;                  // batch * tokens rows; its norm is the one before attention
  const RowNorm* mlp_norm;  // the one before the MLP
  bool parallel;            // the MLP gets what attention gets, not the sum of that and attention
  int projections;          // 3 linears: query, key, value; or 1: per kv head its queries, its key and its value
  bool gated;
  PackedWeight weights[kMaxLinears];  // projections, output, gate where gated, up, down
  const float* biases[kMaxLinears];
  const int64_t* perms[kMaxLinears];
  Compute compute;
  Activation activation;
  RotaryAppend rotary;  // all but query, key, value and rotated; those hold heads and sizes only
  Attention attention;  // all but the data of query and output
  void* output;         // alike x
};

void decoder_layer(DecoderLayer& layer, ParallelFor parallel);

}  // namespace torch_int4
