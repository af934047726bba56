// The experts of a sparse layer: each token's rows go through the MLPs that a router chose for it.
#pragma once
#include "framework/linear.h"

namespace torch_int4 {

// y = down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate.
struct Expert {
  PackedWeight weights[3];  // gate, up, down; or up, down
  const float* biases[3];
  const int64_t *perm, *down_perm;  // of the inputs of gate and up, and of down; or null
};

// Rows of y are sums, in the order of `chosen`, of what experts give for a row of x, times its share. They are summed in
// float and rounded once; they depend on no other row.
struct Experts {
  Input x;  // without norm and perm
  const Expert* experts;
  int64_t count;
  bool gated;
  Activation activation;
  int64_t top_k;          // experts of a row
  const int64_t* chosen;  // [rows][top_k], below `count`; `count` itself stands for none
  const float* shares;    // [rows][top_k]
  void* output;           // [rows][out_features of down], alike x
};

void run_experts(const Experts& e, Compute compute, ParallelFor parallel);

}  // namespace torch_int4
