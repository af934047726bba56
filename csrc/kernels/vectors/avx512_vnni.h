// dpbusd over 512-bit vectors: the V of loops/linear.h for AVX-512 VNNI, and for small M on AMX.
#pragma once
#include "kernels/loops/linear.h"
#include "kernels/vectors/avx512.h"
#include "kernels/vectors/dot_nibbles.h"

namespace torch_int4 {
namespace {

struct Avx512Vnni : Avx512Vectors {
  static constexpr int kTileRows = 12, kDirectRows = 8, kDirectRows8 = 8, kDirectLimit = 16, kFloatRows = 14,
                       kTurnSums = 8;
  static constexpr int kRowStreams = kStreams, kCentre8 = 0;
  static constexpr bool kOneSlab = false;

  // Int8 lines are what dpbusd reads: they stay where they are.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return code_bits(T) == 8 ? 0 : kSlab * kPanelRows;
  }

  template <Source S>
  static TI4_INLINE __m512i load_codes(const uint8_t* w, int j, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kBookLines) {
      const __m512i line = _mm512_loadu_si512(w + j / 2 * kLineBytes);
      const __m512i nibbles = j % 2 ? high_nibbles(line) : low_nibbles(line);
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
  static TI4_INLINE I dot4(I sum, I codes, const int8_t* x) { return _mm512_dpbusd_epi32(sum, codes, spread_quad(x)); }

  template <Source S, int P, int M>
  static TI4_INLINE void dot32(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines && M == 1) return dot_nibbles<Avx512Vnni>(dot, w, x);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512i shared[M];  // by panels; one panel's products read memory
      if constexpr (P > 1) {
        for (int m = 0; m < M; ++m) shared[m] = spread_quad(x + m * kSlab + j * 4);
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512i codes = load_codes<S>(w[p], j, book);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          dot[p][m] = _mm512_dpbusd_epi32(dot[p][m], codes, P > 1 ? shared[m] : spread_quad(x + m * kSlab + j * 4));
        }
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
