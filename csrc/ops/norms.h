// Norms and activations as operators get them.
#pragma once
#include "ops/weights.h"

namespace torch_int4 {

Activation activation_type(const std::string& name, bool gated);

// A norm, and the memory of its parameters where they are not floats.
struct NormView {
  RowNorm norm;
  std::vector<float> weight, bias;
};

// Checks a norm over rows of `count` elements of the dtype of x.
void view_norm(const Tensor& x, int64_t count, const Tensor& weight, const OptionalTensor& bias,
               const NormOptions& options, NormView& view);

}  // namespace torch_int4
