// One row times int4 lines, for instruction sets with dpbusd: include it inside the file's target region.
#pragma once

namespace torch_int4 {
namespace {

// Adds the products of the quads [kFirst, kLast) of a slab, which are even numbers, with P panels. V::dot4 adds those of four inputs to each of 16 sums.
// High nibbles are multiplied where they stand, as 16 times what they mean, and their sums shifted once for all lines:
// exact, as dpbusd never saturates, and each panel has two chains of sums that need not wait for each other.
template <class V, int kFirst, int kLast, int P>
TI4_INLINE void dot_nibbles(typename V::I (&dot)[P][1], const uint8_t* const (&w)[P], const int8_t* x) {
  using I = typename V::I;
  const I low_mask = V::set_int(0x0f0f0f0f), high_mask = V::set_int(int(0xf0f0f0f0u));
  I high[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) high[p] = V::set_int(0);
#pragma GCC unroll 4
  for (int i = 4 * kFirst; i < 4 * kLast; i += 8) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const I line = V::load_line(w[p] + i / 8 * kLineBytes);
      dot[p][0] = V::dot4(dot[p][0], V::and_int(line, low_mask), x + i);
      high[p] = V::dot4(high[p], V::and_int(line, high_mask), x + i + 4);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) dot[p][0] = V::add_int(dot[p][0], V::shift_right_signed(high[p], 4));
}

}  // namespace
}  // namespace torch_int4
