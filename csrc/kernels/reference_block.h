// Norms and gated activations in plain scalar code: the oracle of loops/block.h. Part of reference.cpp.
#pragma once
#include <math.h>

#include "kernels/attention_kernel.h"
#include "kernels/scalar.h"

namespace torch_int4 {
namespace {

float sum_of_lanes(const float* lanes) {
  float sum = lanes[0];
  for (int i = 1; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

void normalize(const float* x, int64_t count, const RowNorm& norm, float* y) {
  float mean = 0;
  if (norm.kind == Norm::kLayer) {
    float sums[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) sums[i % kLanes] += x[i];
    mean = sum_of_lanes(sums) / float(count);
  }
  float squares[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) squares[i % kLanes] = fmaf(x[i] - mean, x[i] - mean, squares[i % kLanes]);
  const float factor = 1.f / sqrtf(sum_of_lanes(squares) / float(count) + norm.eps);
  const bool early = norm.kind == Norm::kRms && norm.offset == 0.f;
  for (int64_t i = 0; i < count; ++i) {
    float z = (x[i] - mean) * factor;
    if (early) z = round_to(norm.dtype, z);
    z *= norm.weight[i] + norm.offset;
    if (norm.bias) z += norm.bias[i];
    y[i] = round_to(norm.dtype, z);
  }
}

float activate(float x, Activation activation) {
  if (activation == Activation::kSilu) return x / (1.f + expf(-x));
  if (activation == Activation::kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  if (activation == Activation::kRelu) return x < 0 ? 0 : x;
  if (activation == Activation::kRelu2) return x < 0 ? 0 : x * x;
  if (activation == Activation::kClampedSwiglu) {
    const float limited = x > kSwigluLimit ? kSwigluLimit : x;
    return limited / (1.f + expf(-kSwigluSlope * limited));
  }
  return 0.5f * x * (1.f + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
}

void gate(float* gate, const float* up, int64_t count, Activation activation, DType dtype) {
  for (int64_t i = 0; i < count; ++i) {
    gate[i] = round_to(dtype, activate(gate[i], activation));
    if (!up) continue;
    float factor = up[i];
    if (activation == Activation::kClampedSwiglu) {
      factor = factor > kSwigluLimit ? kSwigluLimit : factor < -kSwigluLimit ? -kSwigluLimit : factor;
      factor = round_to(dtype, factor + 1.f);
    }
    gate[i] = round_to(dtype, gate[i] * factor);
  }
}

}  // namespace
}  // namespace torch_int4
