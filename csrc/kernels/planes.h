// Inner products for processors without VNNI, over the same vectors V as loops.h. A plane is a view of a weight whose
// codes are at most 15, so that eight products of 16 bits add up exactly; codes of 8 bits are two planes, low + 16 high.
//
// Q supplies the planes: Int4, Int8<nibble>, Book<nibble>, Unpacked; and dot<Plane, P, M>(sums, weights, x, factor, book),
// which adds factor times the inner products of 32 inputs of P panels with M rows.
#pragma once
#include "loops.h"

namespace torch_int4 {
namespace {

template <class Q, class V>
struct PlaneProducts : V {
  using I = typename V::I;

  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kSlab * kPanelRows * (T == WeightType::kInt4 ? 1 : 2);
  }

  template <class Low, class High, int P, int M>
  static TI4_INLINE void dot_planes(I (&dot)[P][M], const uint8_t* const (&low)[P], const uint8_t* const (&high)[P],
                                    const int8_t* x, const Codebook* book) {
    Q::template dot<Low>(dot, low, x, 1, book);
    TI4_KEEP_MEMORY();
    Q::template dot<High>(dot, high, x, 16, book);
  }

  template <Source S, int P, int M>
  static TI4_INLINE void dot32(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    using Int8Low = typename Q::template Int8<0>;
    using Int8High = typename Q::template Int8<1>;
    using BookLow = typename Q::template Book<0>;
    using BookHigh = typename Q::template Book<1>;
    using Unpacked = typename Q::Unpacked;
    if constexpr (S == Source::kInt4Lines) Q::template dot<typename Q::Int4>(dot, w, x, 1, book);
    if constexpr (S == Source::kUnpacked4) Q::template dot<Unpacked>(dot, w, x, 1, book);
    if constexpr (S == Source::kInt8Lines) dot_planes<Int8Low, Int8High>(dot, w, w, x, book);
    if constexpr (S == Source::kBookLines) dot_planes<BookLow, BookHigh>(dot, w, w, x, book);
    if constexpr (S == Source::kUnpacked8) {
      const uint8_t* high[P];
      for (int p = 0; p < P; ++p) high[p] = w[p] + kSlab * kPanelRows;
      dot_planes<Unpacked, Unpacked>(dot, w, high, x, book);
    }
  }
};

}  // namespace
}  // namespace torch_int4
