// compute="fp32" and "bf16" over the same vectors V as loops/linear.h: a block of a panel is dequantized to L1 as
// [input][16] floats and all rows sweep over it. Sums run over the inputs in ascending order, one fused
// multiply-add each, as in the reference, so the results are the same bits for every tile shape.
#pragma once
#include "kernels/loops/linear.h"

namespace torch_int4 {
namespace {

template <class V, WeightType T>
struct FloatLoops {
  using F = typename V::F;
  using I = typename V::I;

  // w = fma(code - zero, scale, offset) for `inputs` inputs that share one group.
  static TI4_INLINE void dequantize(const PackedWeight& w, const uint8_t* codes, int64_t panel, int64_t group,
                                    int64_t inputs, bool bf16, float* target) {
    const int64_t parameter = (panel * w.groups + group) * kPanelRows;
    F scale, zero = V::set(w.offset == Offset::kSymmetric ? float(zero_point(T)) : 0.f), offset = V::zero();
    if (w.offset == Offset::kTwoLevel) load_two_levels<V>(w.scales, parameter, scale, offset);
    else scale = load_parameters<V>(w.scales, w.scale_type, parameter);
    if (w.offset == Offset::kInteger)
      zero = V::to_float(V::load_u8(static_cast<const uint8_t*>(w.offsets) + parameter));
    if (w.offset == Offset::kFloat) offset = load_parameters<V>(w.offsets, w.scale_type, parameter);
    constexpr int kBits = code_bits(T), kMask = code_mask(T), kInputs = line_inputs(T);
    for (int64_t k = 0; k < inputs; k += kInputs, codes += kLineBytes) {
      const I line = V::load_int(codes);
#pragma GCC unroll 8
      for (int j = 0; j < kInputs; ++j) {
        // A row's 32 bits hold bytes j = 0..3; int4 keeps inputs 0..3 in the low and 4..7 in the high nibbles.
        const int shift = 8 * (j % 4) + kBits * (j / 4);
        const I code = V::and_int(V::shift_right(line, shift), V::set_int(kMask));
        F value = T == WeightType::kBook ? V::lookup(w.book->values, code) : V::sub(V::to_float(code), zero);
        value = V::fmadd(value, scale, offset);
        if (bf16) value = V::round_bfloat16(value);
        V::store(target + (k + j) * kPanelRows, value);
      }
    }
  }

  template <int M>
  static TI4_INLINE void tile(const float* weights, int64_t inputs, const float* x, int64_t x_step, float* c) {
    F acc[M];
    for (int m = 0; m < M; ++m) acc[m] = V::load(c + m * kPanelRows);
    for (int64_t slab = 0; slab < inputs; slab += kSlab, x += x_step) {
      for (int k = 0; k < kSlab; ++k, weights += kPanelRows) {
        const F value = V::load(weights);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = V::fmadd(value, V::set(x[m * kSlab + k]), acc[m]);
      }
    }
    for (int m = 0; m < M; ++m) V::store(c + m * kPanelRows, acc[m]);
  }

  template <int M>
  static TI4_INLINE void last_tiles(int rows, const float* weights, int64_t inputs, const float* x, int64_t x_step,
                                    float* c) {
    if constexpr (M > 0) {
      const int done = rows & M;
      if (done) tile<M>(weights, inputs, x, x_step, c);
      last_tiles<M / 2>(rows, weights, inputs, x + done * kSlab, x_step, c + done * kPanelRows);
    }
  }

  static void run(const PackedWeight& w, const FloatRows& a, int64_t first, int64_t last, bool bf16,
                  const Output& out) {
    constexpr int M = V::kFloatRows;
    alignas(64) float weights[kMaxBlock * kPanelRows];
    alignas(64) float c[kRowBlock * kPanelRows];
    const int64_t x_step = a.rows * kSlab;
    for (int64_t row = 0; row < a.rows; row += kRowBlock) {
      const int rows = int(smaller(kRowBlock, a.rows - row));
      for (int64_t panel = first; panel < last; ++panel) {
        for (int i = 0; i < rows; ++i) V::store(c + i * kPanelRows, V::zero());
        const uint8_t* codes = w.codes + panel * w.panel_bytes();
        for (int64_t b = 0; b < w.blocks; ++b) {
          const int64_t inputs = smaller(w.block, w.padded_inputs - b * w.block);
          dequantize(w, codes, panel, b / w.blocks_per_group(), inputs, bf16, weights);
          codes += inputs / kSlab * slab_bytes(T);
          const float* x = a.values + (b * w.block / kSlab * a.rows + row) * kSlab;
          int i = 0;
          for (; i + M <= rows; i += M) tile<M>(weights, inputs, x + i * kSlab, x_step, c + i * kPanelRows);
          last_tiles<largest_power_of_two(M - 1)>(rows - i, weights, inputs, x + i * kSlab, x_step, c + i * kPanelRows);
        }
        store_tile<V>(c, rows, row, panel, w.out_features, out);
      }
    }
  }
};

template <class V>
void loops_linear_float(const PackedWeight& w, const FloatRows& a, int64_t first, int64_t last, bool bf16,
                        const Output& out) {
  if (w.type == WeightType::kInt4) FloatLoops<V, WeightType::kInt4>::run(w, a, first, last, bf16, out);
  else if (w.type == WeightType::kInt8) FloatLoops<V, WeightType::kInt8>::run(w, a, first, last, bf16, out);
  else FloatLoops<V, WeightType::kBook>::run(w, a, first, last, bf16, out);
}

}  // namespace
}  // namespace torch_int4
