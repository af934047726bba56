// Inner products for processors without VNNI, over the same vectors V as loops.h. A plane is a view of a weight whose
// codes are at most 15, so that eight products of 16 bits add up exactly; codes of 8 bits are two planes, low + 16 high.
//
// P supplies the planes: Int4, Int8<nibble>, Book<nibble>, Unpacked; and dot<Plane, M>(sums, weights, x, factor, book),
// which adds factor times the inner products of 32 inputs with M rows.
#pragma once
#include "loops.h"

namespace torch_int4 {
namespace {

template <class P, class V>
struct PlaneProducts : V {
  using I = typename V::I;

  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kSlab * kPanelRows * (T == WeightType::kInt4 ? 1 : 2);
  }

  template <class Low, class High, int M>
  static TI4_INLINE void dot_planes(I (&dot)[M], const uint8_t* low, const uint8_t* high, const int8_t* x,
                                    const Codebook* book) {
    P::template dot<Low, M>(dot, low, x, 1, book);
    TI4_KEEP_MEMORY();
    P::template dot<High, M>(dot, high, x, 16, book);
  }

  template <Source S, int M>
  static TI4_INLINE void dot32(I (&dot)[M], const uint8_t* w, const int8_t* x, const Codebook* book) {
    using Int8Low = typename P::template Int8<0>;
    using Int8High = typename P::template Int8<1>;
    using BookLow = typename P::template Book<0>;
    using BookHigh = typename P::template Book<1>;
    using Unpacked = typename P::Unpacked;
    if constexpr (S == Source::kInt4Lines) P::template dot<typename P::Int4, M>(dot, w, x, 1, book);
    if constexpr (S == Source::kUnpacked4) P::template dot<Unpacked, M>(dot, w, x, 1, book);
    if constexpr (S == Source::kInt8Lines) dot_planes<Int8Low, Int8High, M>(dot, w, w, x, book);
    if constexpr (S == Source::kBookLines) dot_planes<BookLow, BookHigh, M>(dot, w, w, x, book);
    if constexpr (S == Source::kUnpacked8) {
      dot_planes<Unpacked, Unpacked, M>(dot, w, w + kSlab * kPanelRows, x, book);
    }
  }
};

}  // namespace
}  // namespace torch_int4
