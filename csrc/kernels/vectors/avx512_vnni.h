// dpbusd over 512-bit vectors: the V of loops/linear.h for AVX-512 VNNI, and for small M on AMX.
#pragma once
#include "kernels/loops/linear.h"
#include "kernels/vectors/avx512.h"
#include "kernels/vectors/dot_nibbles.h"

namespace torch_int4 {
namespace {

struct Avx512Vnni : Avx512Vectors, UnsignedCodes {
  static constexpr int kTileRows = 6, kTileWidth = 4, kPassRows = 132, kDirectRows = 8, kDirectRows8 = 8,
                       kDirectLimit = 16, kFloatRows = 14, kTurnSums = 8;
  static constexpr int kRowStreams = kStreams;
  static constexpr bool kOneSlab = false;

  template <Source S>
  static TI4_INLINE __m512i load_codes(const uint8_t* w, int j, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kBookLines || is_split(S)) {
      const __m512i line = _mm512_loadu_si512(w + j / 2 * kLineBytes);
      const __m512i nibbles = j % 2 ? high_nibbles(line) : low_nibbles(line);
      if constexpr (is_split(S)) return _mm512_or_si512(nibbles, (high_part<Avx512Vnni, S>(w, j, 0)));
      return S == Source::kBookLines ? lookup_bytes(book->codes, nibbles) : nibbles;
    } else {
      return _mm512_loadu_si512(w + j * kLineBytes);
    }
  }

  // In a register: gcc would rather read memory for each of two masks, of which Zen 4 does only one line a cycle.
  static TI4_INLINE I load_line(const uint8_t* p) {
    I line = load_int(p);
    TI4_KEEP(line);
    return line;
  }
  // gcc 12 copies the sum of the intrinsic, and spills where few registers are free.
  static TI4_INLINE I add_products(I sum, I codes, I quad) {
#ifdef TORCH_INT4_EMULATE
    return _mm512_dpbusd_epi32(sum, codes, quad);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(quad));
    return sum;
#endif
  }
  static TI4_INLINE I dot4(I sum, I codes, const int8_t* x) { return _mm512_dpbusd_epi32(sum, codes, spread_quad(x)); }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines && M == 1) return dot_nibbles<Avx512Vnni, kFirst, kLast>(dot, w, x);
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
      __m512i codes[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) codes[p] = load_codes<S>(w[p], j, book);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512i quad = spread_quad(x + m * kSlab + j * 4);  // loaded once for all panels
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) dot[p][m] = add_products(dot[p][m], codes[p], quad);
      }
    }
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    constexpr Source S = packed_source(T);
    for (int j = 0; j < 8; ++j) _mm512_store_si512(target + j * kLineBytes, load_codes<S>(lines, j, book));
  }
};

}  // namespace
}  // namespace torch_int4
