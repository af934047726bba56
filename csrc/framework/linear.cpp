#include "framework/linear.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "framework/buffer.h"
#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

constexpr int64_t kParallelElements = 1 << 13;  // quantizing fewer elements of x than this is not worth a fork-join
constexpr int64_t kNormCost = 4;                // elements quantized in the time that one is normalized, or gated
constexpr int64_t kThreadBytes = 1 << 15;       // weight bytes times rows that are worth a thread
constexpr int64_t kPieceBytes = 1 << 16;        // weight bytes times rows of the smallest piece that threads pick up
constexpr int64_t kPassRows = 128;              // kernels read weights once for so many rows, or more often

// Several read streams per thread keep more reads under way than one; TORCH_INT4_STREAMS=1 turns that off.
int streams() {
  static const int value = [] {
    const char* text = getenv("TORCH_INT4_STREAMS");
    return text ? atoi(text) : 2;
  }();
  return value;
}

float round_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000u;
  bits = (is_nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

struct Job {
  const IsaKernels& kernels;
  const PackedWeight* weights;
  const Output* outputs;
  int count;
  const Input& x;
  Compute compute;
  QuantizedRows quantized;
  FloatRows floats;
  int64_t panels = 0, given = 0, piece = 0;  // of all weights; given out beforehand; worth picking up
  std::atomic<int64_t> next{0};              // the first panel that nobody has picked up

  const PackedWeight& w() const { return weights[0]; }  // what all of them share: inputs and blocks
  bool integer() const { return compute == Compute::kInt8 || compute == Compute::kInt8x2; }
  int terms() const { return compute == Compute::kInt8x2 ? 2 : 1; }
};

// Row `row` of x as floats, before its permutation: normalized, gated or as it is.
void load_row(const Job& job, int64_t row, float* target) {
  thread_local Buffer other;
  const Input& x = job.x;
  const int64_t k = job.w().in_features, byte = row * k * element_bytes(x.dtype);
  const char* source = static_cast<const char*>(x.data) + byte;
  if (x.norm) {
    const auto* values = reinterpret_cast<const float*>(source);
    if (x.dtype != DType::kF32) job.kernels.to_float(source, x.dtype, k, target), values = target;
    job.kernels.normalize(values, k, *x.norm, target);
  } else if (x.activation) {
    float* up = x.gate ? other.get<float>(k) : nullptr;
    if (up) job.kernels.to_float(source, x.dtype, k, up);
    job.kernels.to_float(x.gate ? static_cast<const char*>(x.gate) + byte : source, x.dtype, k, target);
    job.kernels.gate(target, up, k, *x.activation, x.dtype);
  } else {
    job.kernels.to_float(source, x.dtype, k, target);
  }
}

// Row `row` of x as floats, permuted and padded with zeros to whole slabs.
const float* padded_row(const Job& job, int64_t row, Buffer& converted, Buffer& permuted) {
  const Input& x = job.x;
  const int64_t k = job.w().in_features, padded = job.w().padded_inputs;
  const bool changes = x.dtype != DType::kF32 || x.perm || x.norm || x.activation || padded != k;
  if (!changes) return static_cast<const float*>(x.data) + row * k;
  float* target = converted.get<float>(padded);
  load_row(job, row, target);
  if (x.perm) {
    float* gathered = permuted.get<float>(padded);
    for (int64_t i = 0; i < k; ++i) gathered[i] = target[x.perm[i]];
    target = gathered;
  }
  memset(target + k, 0, size_t(padded - k) * sizeof(float));
  return target;
}

void prepare_rows(void* context, int64_t begin, int64_t end) {
  thread_local Buffer converted, permuted;
  const Job& job = *static_cast<const Job*>(context);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = padded_row(job, row, converted, permuted);
    if (job.integer()) {
      const int terms = job.terms();
      job.kernels.quantize(x, job.w().padded_inputs, job.w().block, job.quantized, row * terms, terms);
      continue;
    }
    for (int64_t k = 0; k < job.w().padded_inputs; k += kSlab) {
      float* target = job.floats.values + (k / kSlab * job.floats.rows + row) * kSlab;
      if (job.compute == Compute::kFp32) memcpy(target, x + k, kSlab * sizeof(float));
      else
        for (int i = 0; i < kSlab; ++i) target[i] = round_to_bfloat16(x[k + i]);
    }
  }
}

// Panels [begin, end) of all the weights in a row.
void run_range(const Job& job, int64_t begin, int64_t end) {
  for (int i = 0; i < job.count && end > 0; ++i) {
    const PackedWeight& w = job.weights[i];
    const int64_t panels = w.panels(), first = begin > 0 ? begin : 0, last = end < panels ? end : panels;
    begin -= panels;
    end -= panels;
    if (first >= last) continue;
    Output out = job.outputs[i];
    out.terms = job.terms();
    if (job.integer()) job.kernels.linear_int8(w, job.quantized, first, last, streams(), out);
    else job.kernels.linear_float(w, job.floats, first, last, job.compute == Compute::kBf16, out);
  }
}

// Panels [begin, end) of those that are given out beforehand, and then of the others as long as there are any, so that
// threads end together although one may be slowed down, by what shares its core or its way to memory.
void run_panels(void* context, int64_t begin, int64_t end) {
  Job& job = *static_cast<Job*>(context);
  const int64_t mine = end - begin;
  if (mine == job.given) return run_range(job, 0, job.panels);  // one thread, which has all of it
  if (mine == 0) return;
  run_range(job, begin, end);
  const int64_t threads = (job.given + mine - 1) / mine;
  const int64_t each = std::max<int64_t>(1, (job.panels - job.given) / threads), piece = std::min(job.piece, each);
  int64_t first = job.next.load(std::memory_order_relaxed);
  while (first < job.panels) {
    const int64_t share = (job.panels - first) / (2 * threads) / piece * piece;
    const int64_t last = std::min(first + std::max(share, piece), job.panels);
    if (!job.next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
    run_range(job, first, last);
    first = job.next.load(std::memory_order_relaxed);
  }
}

// How many of the panels are given out beforehand: most, as whole ranges are read best and one row is little else than
// reading, and all where the rest would not make enough pieces to balance anything.
int64_t given_panels(int64_t panels, int64_t rows, int64_t piece) {
  const int64_t rest = panels / (rows == 1 ? 16 : 4);
  return rest < 2 * piece ? panels : panels - rest;
}

}  // namespace

const char* linear(const PackedWeight* w, const Output* y, int count, const Input& x, Compute compute,
                   ParallelFor parallel) {
  thread_local Buffer values, scales, sums, scaled_sums;
  Job job{active_kernels(), w, y, count, x, compute, {}, {}};
  const int64_t rows = x.rows * job.terms(), inputs = w->padded_inputs;
  if (job.integer()) {
    const int64_t blocks = rows * w->blocks;
    job.quantized = {values.get<int8_t>(rows * inputs), scales.get<float>(blocks), sums.get<int32_t>(blocks),
                     scaled_sums.get<float>(blocks), rows};
  } else {
    job.floats = {values.get<float>(rows * inputs), rows};
  }
  const int64_t row_cost = inputs * (x.norm || x.activation ? kNormCost : 1);
  if (x.rows > 1 && x.rows * row_cost >= kParallelElements) {
    parallel(x.rows, 1 + kParallelElements / 2 / row_cost, prepare_rows, &job);
  } else {
    prepare_rows(&job, 0, x.rows);
  }
  for (int i = 0; i < count; ++i) job.panels += w[i].panels();
  const int64_t row_bytes = w->panel_bytes() * rows;
  job.piece = std::max<int64_t>(1, (kPieceBytes / row_bytes + 3) / 4 * 4);  // four panels are read at once
  job.next = job.given = given_panels(job.panels, rows, job.piece);
  parallel(job.given, 1 + kThreadBytes / row_bytes, run_panels, &job);
  values.trim(kKeptBytes);
  return job.kernels.name;
}

namespace {

// All rows of m at once.
void mlp_pass(const Mlp& m, Compute compute, ParallelFor parallel) {
  thread_local Buffer buffer;  // gate and up, in the type of x
  const int64_t inner = m.weights[0].out_features, rows = m.x.rows;
  const int64_t bytes = rows * inner * element_bytes(m.x.dtype);
  const int count = m.gated ? 2 : 1;
  char* first = buffer.get<char>(count * bytes);
  const Output inside[] = {{first, m.x.dtype, inner, m.biases[0], 1},
                           {first + bytes, m.x.dtype, inner, m.biases[1], 1}};
  linear(m.weights, inside, count, m.x, compute, parallel);
  Input product{m.gated ? first + bytes : first, m.x.dtype, rows, m.down_perm};
  product.gate = m.gated ? first : nullptr;
  product.activation = &m.activation;
  Output output = m.output;
  output.bias = m.biases[count];
  linear(m.weights + count, &output, 1, product, compute, parallel);
  buffer.trim(kKeptBytes);
}

}  // namespace

void mlp(const Mlp& m, Compute compute, ParallelFor parallel) {
  const int64_t bytes = element_bytes(m.x.dtype), inner_bytes = m.weights[0].out_features * bytes;
  const int64_t fit = int64_t(kKeptBytes) / ((m.gated ? 2 : 1) * inner_bytes) / kPassRows * kPassRows;
  const int64_t pass = fit > kPassRows ? fit : kPassRows;
  for (int64_t row = 0; row < m.x.rows; row += pass) {
    Mlp part = m;
    part.x.rows = m.x.rows - row < pass ? m.x.rows - row : pass;
    part.x.data = static_cast<const char*>(m.x.data) + row * m.weights[0].in_features * bytes;
    const int64_t skipped = row * m.output.stride * bytes;
    part.output.data = static_cast<char*>(m.output.data) + skipped;
    if (m.output.residual) part.output.residual = static_cast<const char*>(m.output.residual) + skipped;
    mlp_pass(part, compute, parallel);
  }
}

}  // namespace torch_int4
