// The framework around the kernels: quantize rows, split panels over threads, call the micro-kernel. No ATen, so that
// the same code also runs in plain test programs.
#pragma once
#include "kernels/kernel.h"

namespace torch_int4 {

enum class Compute : int { kInt8, kInt8x2, kBf16, kFp32 };

struct Input {
  const void* data;  // [rows][in_features], contiguous
  DType dtype;
  int64_t rows;
  const int64_t* perm;  // input k of the weight is input perm[k] of x; or null
  // A row may first be normalized, or go through the activation, or be multiplied with the activation of a row of
  // `gate`.
  const RowNorm* norm = nullptr;
  const Activation* activation = nullptr;
  const void* gate = nullptr;  // alike data
};

// Runs body(context, begin, end) over [0, count) on the caller's thread pool, at least `grain` items a thread.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, ParallelBody body, void* context);

// y[i] = x w[i]^T + bias for `count` weights with the same inputs: x is quantized once for each length of blocks among
// them, and one fork-join covers all of them. Returns the name of the kernel set that ran.
const char* linear(const PackedWeight* w, const Output* y, int count, const Input& x, Compute compute,
                   ParallelFor parallel);

// y = down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate, where x may be normalized before
// and y added to a residual. Many rows run in passes, whose gates and ups fit a buffer that stays allocated.
struct Mlp {
  Input x;
  bool gated;
  PackedWeight weights[3];  // gate, up, down; or up, down
  const float* biases[3];
  const int64_t* down_perm;
  Activation activation;
  Output output;  // its bias is that of down
};

void mlp(const Mlp& m, Compute compute, ParallelFor parallel);

}  // namespace torch_int4
