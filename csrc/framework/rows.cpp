#include "framework/rows.h"

#include <string.h>

#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

float round_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000u;
  bits = (is_nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

// Row `row` of x as k floats, before its permutation: normalized, gated or as it is.
void load_row(const IsaKernels& kernels, const Input& x, int64_t row, int64_t k, float* target) {
  thread_local Buffer other;
  const int64_t byte = row * k * element_bytes(x.dtype);
  const char* source = static_cast<const char*>(x.data) + byte;
  if (x.norm) {
    const auto* values = reinterpret_cast<const float*>(source);
    if (x.dtype != DType::kF32) kernels.to_float(source, x.dtype, k, target), values = target;
    kernels.normalize(values, k, *x.norm, target);
  } else if (x.activation) {
    float* up = x.gate ? other.get<float>(k) : nullptr;
    if (up) kernels.to_float(source, x.dtype, k, up);
    kernels.to_float(x.gate ? static_cast<const char*>(x.gate) + byte : source, x.dtype, k, target);
    kernels.gate(target, up, k, *x.activation, x.dtype);
  } else {
    kernels.to_float(source, x.dtype, k, target);
  }
}

// The same, permuted and padded with zeros to whole slabs.
const float* padded_row(const IsaKernels& kernels, const Input& x, int64_t row, const PackedWeight& w) {
  thread_local Buffer converted, permuted;
  const int64_t k = w.in_features, padded = w.padded_inputs;
  const bool changes = x.dtype != DType::kF32 || x.perm || x.norm || x.activation || padded != k;
  if (!changes) return static_cast<const float*>(x.data) + row * k;
  float* target = converted.get<float>(padded);
  load_row(kernels, x, row, k, target);
  if (x.perm) {
    float* gathered = permuted.get<float>(padded);
    for (int64_t i = 0; i < k; ++i) gathered[i] = target[x.perm[i]];
    target = gathered;
  }
  memset(target + k, 0, size_t(padded - k) * sizeof(float));
  return target;
}

}  // namespace

void prepare_row(const Input& x, int64_t row, const PackedWeight& w, Compute compute, const PreparedRows& target,
                 int64_t target_row) {
  const IsaKernels& kernels = active_kernels();
  const float* values = padded_row(kernels, x, row, w);
  if (is_integer(compute)) {
    const int terms = terms_of(compute);
    kernels.quantize(values, w.padded_inputs, w.block, target.quantized, target_row * terms, terms);
    return;
  }
  for (int64_t k = 0; k < w.padded_inputs; k += kSlab) {
    float* slab = target.floats.values + (k / kSlab * target.floats.rows + target_row) * kSlab;
    if (compute == Compute::kFp32) memcpy(slab, values + k, kSlab * sizeof(float));
    else
      for (int i = 0; i < kSlab; ++i) slab[i] = round_to_bfloat16(values[k + i]);
  }
}

}  // namespace torch_int4
