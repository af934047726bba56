// One row of x, as decoding has it: nothing is in these loops that only more rows need, because every instruction more
// between two lines is one line less that the processor has asked memory for.
#pragma once
#include "kernels/loops/common.h"

namespace torch_int4 {
namespace {

// Out of line, because every loop below ends in it.
template <class V>
__attribute__((noinline)) void store_row(const float* c, int64_t panel, int64_t out_features, const Output& out) {
  store_rows<V>(c, 1, 0, panel, out_features, out);
}

template <class V, WeightType T, Offset O>
struct OneRow : Int8Block<V, T, O> {
  using Block = Int8Block<V, T, O>;
  using typename Block::F;
  using typename Block::I;

  // Q panels over one block of kSlabs slabs, or, where that is 0, of as many as `slabs` says; or over the quads [kFirst,
  // kLast) of one slab.
  template <int kSlabs, int kFirst, int kLast, int Q>
  static TI4_INLINE void block(F (&acc)[Q], const uint8_t* (&codes)[Q], const PackedWeight& w, const QuantizedRows& a,
                               const int8_t* x, int64_t slabs, int64_t b, const int64_t (&first)[Q],
                               int64_t parameter) {
    I dot[Q][1];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) dot[q][0] = Block::start(a, b);
    for (int64_t k = 0; k < (kSlabs ? kSlabs : slabs); ++k, x += kSlab) {
      V::template dot<packed_source(T), kFirst, kLast>(dot, codes, x, w.book);
      if constexpr (kLast < kQuads) continue;  // the next half of the slab comes from the same lines
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) codes[q] += slab_bytes(T);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const auto g = Block::load_group(w, ScaleType::kF16, first[q] + parameter);
      acc[q] = Block::finish(acc[q], dot[q][0], g, a, b);
    }
  }

  // The same over a slab whose halves are blocks.
  template <int Q>
  static TI4_INLINE void halves(F (&acc)[Q], const uint8_t* (&codes)[Q], const PackedWeight& w, const QuantizedRows& a,
                                const int8_t* x, int64_t b, const int64_t (&first)[Q], int64_t parameter) {
    constexpr int kMiddle = kQuads / 2;
    block<1, 0, kMiddle>(acc, codes, w, a, x, 1, b, first, parameter);
    block<1, kMiddle, kQuads>(acc, codes, w, a, x, 1, b + 1, first, parameter + kPanelRows);
  }

  // P panels, `apart` panels from each other.
  template <int kSlabs, int P>
  static TI4_INLINE void panels(const PackedWeight& w, const QuantizedRows& a, int64_t panel, int64_t apart,
                                const Output& out) {
    constexpr int Q = Block::template turns<1, P>();
    F acc[P / Q][Q];
    const uint8_t* codes[P / Q][Q];
    int64_t first[P / Q][Q];
    for (int p = 0; p < P; ++p) {
      first[p / Q][p % Q] = (panel + p * apart) * w.groups * kPanelRows;
      codes[p / Q][p % Q] = w.codes + (panel + p * apart) * w.panel_bytes();
      acc[p / Q][p % Q] = V::zero();
    }
    const int8_t* x = a.codes;
    [[maybe_unused]] const int64_t slabs = w.block / kSlab, whole = w.padded_inputs / w.block;
    [[maybe_unused]] const int64_t per_group = w.blocks_per_group();
    [[maybe_unused]] int64_t b = 0, parameter = 0, in_group = 0;
    if constexpr (Block::kHalves) {
      for (; b < w.blocks; b += 2, x += kSlab, parameter += 2 * kPanelRows) {
#pragma GCC unroll 8
        for (int p = 0; p < P / Q; ++p) halves(acc[p], codes[p], w, a, x, b, first[p], parameter);
      }
    } else {
      for (; b < whole; ++b, x += (kSlabs ? kSlabs : slabs) * kSlab) {
#pragma GCC unroll 8
        for (int p = 0; p < P / Q; ++p)
          block<kSlabs, 0, kQuads>(acc[p], codes[p], w, a, x, slabs, b, first[p], parameter);
        if (++in_group == per_group) in_group = 0, parameter += kPanelRows;
      }
      if (b < w.blocks) {  // a shorter one at the end
        const int64_t left = w.padded_inputs / kSlab - whole * slabs;
        for (int p = 0; p < P / Q; ++p) block<0, 0, kQuads>(acc[p], codes[p], w, a, x, left, b, first[p], parameter);
      }
    }
    alignas(64) float c[P][kPanelRows];
    for (int p = 0; p < P; ++p) V::store(c[p], acc[p / Q][p % Q]);
    for (int p = 0; p < P; ++p) store_row<V>(c[p], panel + p * apart, w.out_features, out);
  }

  template <int kSlabs, int P>
  static void segments(const PackedWeight& w, const QuantizedRows& rows, int64_t first, int64_t last,
                       const Output& out) {
    const QuantizedRows a = rows;  // a copy: no store can change its pointers
    const int64_t segment = (last - first) / P;
    for (int64_t i = 0; i < segment; ++i) panels<kSlabs, P>(w, a, first + i, segment, out);
    for (int64_t i = first + P * segment; i < last; ++i) panels<kSlabs, 1>(w, a, i, 0, out);
  }

  static bool serves(const PackedWeight& w, const QuantizedRows& a) {
    return a.rows == 1 && w.scale_type == ScaleType::kF16;
  }

  // Panels [first, last), as P streams, with the loops of the blocks' length.
  template <int P>
  static void run(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, const Output& out) {
    if constexpr (Block::kHalves) {
      segments<1, P>(w, a, first, last, out);
    } else {
      if (w.block == kSlab) return segments<1, P>(w, a, first, last, out);
      if (w.block == kMaxBlock) return segments<kMaxBlock / kSlab, P>(w, a, first, last, out);
      segments<0, P>(w, a, first, last, out);
    }
  }
};

}  // namespace
}  // namespace torch_int4
