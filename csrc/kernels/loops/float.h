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

  struct Group {
    F scale, zero, offset;
  };

  static TI4_INLINE Group load_group(const PackedWeight& w, int64_t parameter) {
    Group g{V::zero(), V::set(takes_zero_point(w.offset) ? float(zero_point(T)) : 0.f), V::zero()};
    if (w.offset == Offset::kTwoLevel) load_two_levels<V>(w.scales, parameter, g.scale, g.offset);
    else if (w.offset == Offset::kTwoLevelScale) g.scale = load_two_level_scale<V, kSlab>(w.scales, parameter);
    else if (w.offset == Offset::kTwoLevelHalves) g.scale = load_two_level_scale<V, kHalf>(w.scales, parameter);
    else g.scale = load_parameters<V>(w.scales, w.scale_type, parameter);
    if (w.offset == Offset::kInteger)
      g.zero = V::to_float(V::load_u8(static_cast<const uint8_t*>(w.offsets) + parameter));
    if (w.offset == Offset::kFloat) g.offset = load_parameters<V>(w.offsets, w.scale_type, parameter);
    return g;
  }

  // w = fma(code - zero, scale, offset) for `inputs` inputs of a panel, from `input` on, that share one group.
  static TI4_INLINE void dequantize_group(const PackedWeight& w, int64_t panel, int64_t input, int64_t inputs,
                                          bool bf16, float* target) {
    const Group g = load_group(w, (panel * w.groups + input / w.group) * kPanelRows);
    const uint8_t* slab = w.codes + panel * w.panel_bytes() + input / kSlab * slab_bytes(T);
    if (inputs == kHalf) {
      if (input % kSlab == 0) return dequantize_quads<0, kQuads / 2>(w, slab, g, bf16, target);
      return dequantize_quads<kQuads / 2, kQuads>(w, slab, g, bf16, target);
    }
    for (int64_t k = 0; k < inputs; k += kSlab, slab += slab_bytes(T)) {
      dequantize_quads<0, kQuads>(w, slab, g, bf16, target + k * kPanelRows);
    }
  }

  template <int kFirst, int kLast>
  static TI4_INLINE void dequantize_quads(const PackedWeight& w, const uint8_t* slab, const Group& g, bool bf16,
                                          float* target) {
#pragma GCC unroll 8
    for (int quad = kFirst; quad < kLast; ++quad) {
      const I codes = quad_codes(slab, quad);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, target += kPanelRows) {
        const I code = V::and_int(V::shift_right(codes, 8 * j), V::set_int(code_mask(T)));
        F value = T == WeightType::kBook ? V::lookup(w.book->values, code) : V::sub(V::to_float(code), g.zero);
        value = V::fmadd(value, g.scale, g.offset);
        if (bf16) value = V::round_bfloat16(value);
        V::store(target, value);
      }
    }
  }

  // The codes of the four inputs of a quad, in the low bits of the four bytes of each row.
  static TI4_INLINE I quad_codes(const uint8_t* slab, int quad) {
    const I low = V::load_int(slab + quad / low_quads(T) * kLineBytes);
    I codes = V::shift_right(low, quad % low_quads(T) * low_bits(T));
    if constexpr (high_bits(T) > 0) {
      constexpr int kBits = high_bits(T), kLowMask = ((1 << low_bits(T)) - 1) * 0x01010101;
      const I line = V::load_int(slab + low_bytes(T) + quad / high_quads(T) * kLineBytes);
      const I high =
          V::and_int(V::shift_right(line, quad % high_quads(T) * kBits), V::set_int(((1 << kBits) - 1) * 0x01010101));
      codes = V::add_int(V::and_int(codes, V::set_int(kLowMask)), V::shift_left(high, low_bits(T)));
    }
    return codes;
  }

  // The same for `inputs` inputs whose groups are whole, or one.
  static TI4_INLINE void dequantize(const PackedWeight& w, int64_t panel, int64_t input, int64_t inputs, bool bf16,
                                    float* target) {
    for (int64_t k = 0; k < inputs; k += w.group) {
      dequantize_group(w, panel, input + k, smaller(w.group, inputs - k), bf16, target + k * kPanelRows);
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

  // Inputs that are dequantized at once: a block, and at least a slab.
  static int64_t span_of(const PackedWeight& w) { return w.block < kSlab ? kSlab : w.block; }

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
        for (int64_t input = 0, inputs; input < w.padded_inputs; input += inputs) {
          inputs = smaller(span_of(w), w.padded_inputs - input);
          dequantize(w, panel, input, inputs, bf16, weights);
          const float* x = a.values + (input / kSlab * a.rows + row) * kSlab;
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
  with_type(w.type, [&](auto type) { FloatLoops<V, type>::run(w, a, first, last, bf16, out); });
}

}  // namespace
}  // namespace torch_int4
