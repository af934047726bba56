// The scalar kernel: the oracle for every other one, and the fallback where no other one runs.
#include <math.h>

#include "kernels/kernel.h"
#include "kernels/reference_attention.h"
#include "kernels/reference_block.h"
#include "kernels/scalar.h"

namespace torch_int4 {
namespace {

int code(const PackedWeight& w, int64_t panel, int lane, int64_t k) {
  return code_in_panel(w.type, w.codes + panel * w.panel_bytes(), lane, k);
}

GroupParameters group_parameters(const PackedWeight& w, int64_t panel, int lane, int64_t group) {
  return group_parameters(w, (panel * w.groups + group) * kPanelRows + lane);
}

void to_float(const void* source, DType dtype, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = load_element(source, dtype, i);
}

int8_t round_code(float x) {
  const long r = lrintf(x);
  return int8_t(r > 127 ? 127 : r < -127 ? -127 : r);
}

void quantize(const float* x, int64_t count, int64_t block, const QuantizedRows& rows, int64_t row, int terms) {
  for (int64_t b = 0; b * block < count; ++b) {
    const int64_t begin = b * block, end = smaller(begin + block, count);
    uint32_t largest = 0;  // as bits: NaN sorts above infinity, infinity above every number
    for (int64_t k = begin; k < end; ++k) {
      const uint32_t magnitude = float_bits(x[k]) & 0x7fffffff;
      if (magnitude > largest) largest = magnitude;
    }
    const float absmax = bits_float(largest);
    const bool finite = largest < 0x7f800000u, tiny = absmax < kTinyBlock;
    const float scale = !finite ? NAN : tiny ? 0.f : absmax / 127.f;
    const float inverse = !finite || tiny ? 0.f : 127.f / absmax;
    int sum[2] = {0, 0};
    for (int64_t k = begin; k < end; ++k) {
      const float value = finite ? x[k] : 0.f;
      const int8_t high = round_code(value * inverse);
      int8_t* target = rows.codes + ((k / kSlab) * rows.rows + row) * kSlab + k % kSlab;
      target[0] = high;
      sum[0] += high;
      if (terms == 2) {
        const float residual = tiny || !finite ? 0.f : fmaf(-float(high), scale, value);
        target[kSlab] = round_code(residual * (inverse * 254.f));
        sum[1] += target[kSlab];
      }
    }
    for (int t = 0; t < terms; ++t) rows.set_block(b * rows.rows + row + t, t ? scale / 254.f : scale, sum[t]);
  }
}

float dot_int8(const PackedWeight& w, const QuantizedRows& a, int64_t row, int64_t panel, int lane) {
  float acc = 0;
  for (int64_t b = 0; b < w.blocks; ++b) {
    const GroupParameters p = group_parameters(w, panel, lane, b / w.blocks_per_group());
    const float scale = a.scales[b * a.rows + row];
    const int sum = a.sums[b * a.rows + row];
    int dot = 0;
    for (int64_t k = b * w.block; k < smaller((b + 1) * w.block, w.padded_inputs); ++k) {
      const int c = code(w, panel, lane, k);
      dot += (w.book ? w.book->codes[c] : c) * a.codes[((k / kSlab) * a.rows + row) * kSlab + k % kSlab];
    }
    const float weight_scale = w.book ? p.scale * w.book->step : p.scale;
    acc = fmaf(float(dot - p.zero * sum), weight_scale * scale, acc);
    if (adds_offset(w.offset)) acc = fmaf(p.offset, a.scaled_sums[b * a.rows + row], acc);
  }
  return acc;
}

float dot_float(const PackedWeight& w, const FloatRows& a, int64_t row, int64_t panel, int lane, bool bf16) {
  float acc = 0;
  for (int64_t k = 0; k < w.padded_inputs; ++k) {
    const GroupParameters p = group_parameters(w, panel, lane, k / w.group);
    const int c = code(w, panel, lane, k);
    float value = fmaf(w.book ? w.book->values[c] : float(c - p.zero), p.scale, p.offset);
    if (bf16) value = from_bfloat16(to_bfloat16(value));
    acc = fmaf(value, a.values[((k / kSlab) * a.rows + row) * kSlab + k % kSlab], acc);
  }
  return acc;
}

// Calls dot(row, panel, lane) for every output of panels [first, last) and stores the sums of `terms` rows.
template <class Dot>
void for_each_output(const PackedWeight& w, int64_t rows, int64_t first, int64_t last, const Output& out, Dot dot) {
  for (int64_t n = first * kPanelRows; n < smaller(last * kPanelRows, w.out_features); ++n) {
    for (int64_t row = 0; row < rows; row += out.terms) {
      float y = dot(row, n / kPanelRows, int(n % kPanelRows));
      for (int t = 1; t < out.terms; ++t) y += dot(row + t, n / kPanelRows, int(n % kPanelRows));
      if (out.bias) y += out.bias[n];
      store_output(out, row / out.terms * out.stride + n, y);
    }
  }
}

void linear_int8(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, int, const Output& out) {
  for_each_output(w, a.rows, first, last, out,
                  [&](int64_t row, int64_t panel, int lane) { return dot_int8(w, a, row, panel, lane); });
}

void linear_float(const PackedWeight& w, const FloatRows& a, int64_t first, int64_t last, bool bf16,
                  const Output& out) {
  for_each_output(w, a.rows, first, last, out,
                  [&](int64_t row, int64_t panel, int lane) { return dot_float(w, a, row, panel, lane, bf16); });
}

bool supported() { return true; }

IsaKernels kernels{"reference", 0,      supported, to_float, quantize,  linear_int8, linear_float,
                   from_float,  rotate, attend,    attend,   normalize, gate};
[[maybe_unused]] const bool registered = register_kernels(&kernels);

}  // namespace
}  // namespace torch_int4
