// AVX-512 F/BW/DQ/VL without VNNI (Skylake-SP and kin): the products of avx2.cpp, one 512-bit vector for 16 rows.

#include "kernels/attention_kernel.h"
#include "kernels/kernel.h"
#include "kernels/scalar.h"
#include "kernels/simd_x86.h"

#ifdef TI4_X86
#include "kernels/probes/x86.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#include "kernels/loops/attention.h"
#include "kernels/loops/block.h"
#include "kernels/loops/float.h"
#include "kernels/loops/linear.h"
#include "kernels/loops/quantize.h"
#include "kernels/vectors/avx512.h"

namespace torch_int4 {
namespace {

struct Avx512 : Avx512Vectors, SignedPlanes {
  static constexpr int kTileRows = 8, kTileWidth = 1, kPassRows = 128, kDirectRows = 4, kDirectRows8 = 4,
                       kDirectLimit = 12, kFloatRows = 14, kTurnSums = 8;
  static constexpr int kRowStreams = kStreams;
  static constexpr bool kOneSlab = false;

  // The weights of 4 inputs, quad j of 32 inputs, at most 15 each.
  template <Source S>
  static TI4_INLINE __m512i load_nibbles(const uint8_t* w, int j) {
    if (S == Source::kUnpacked4) return load_int(w + j * kLineBytes);
    const __m512i line = load_int(w + j / 2 * kLineBytes);
    return j % 2 ? high_nibbles(line) : low_nibbles(line);
  }

  struct Signed {
    __m512i value, magnitude;
  };
  template <Source S>
  static TI4_INLINE Signed load_signed(const uint8_t* w, int j, const Codebook* book) {
    const uint8_t* line = w + j * kLineBytes;
    if constexpr (S == Source::kUnpacked8) return {load_int(line), load_int(line + kPlane)};
    if constexpr (is_split(S)) {
      const __m512i codes = _mm512_or_si512(load_nibbles<S>(w, j), (high_part<Avx512, S>(w, j, 0)));
      const __m512i centred = _mm512_sub_epi8(codes, _mm512_set1_epi8(zero_point(split_type(S))));
      return {centred, _mm512_abs_epi8(centred)};
    }
    const __m512i value = S == Source::kBookLines ? lookup_bytes(book->weights, load_nibbles<S>(w, j))
                                                  : _mm512_xor_si512(load_int(line), _mm512_set1_epi8(-128));
    return {value, _mm512_abs_epi8(value)};
  }

  static TI4_INLINE __m512i add_pairs(__m512i sum, __m512i pairs) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot_nibbles(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x) {
    __m512i sum[P][M];
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512i codes = load_nibbles<S>(w[p], j);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const __m512i product = _mm512_maddubs_epi16(codes, spread_quad(x + m * kSlab + j * 4));
          sum[p][m] = j > kFirst ? _mm512_add_epi16(sum[p][m], product) : product;
          TI4_KEEP(sum[p][m]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) dot[p][m] = add_pairs(dot[p][m], sum[p][m]);
    }
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot_signed(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x,
                                    const Codebook* book) {
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const Signed codes = load_signed<S>(w[p], j, book);
        const __mmask64 negative = _mm512_movepi8_mask(codes.value);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const __m512i b = spread_quad(x + m * kSlab + j * 4);
          const __m512i with_sign = _mm512_mask_sub_epi8(b, negative, _mm512_setzero_si512(), b);
          dot[p][m] = add_pairs(dot[p][m], _mm512_maddubs_epi16(codes.magnitude, with_sign));
          TI4_KEEP(dot[p][m]);
        }
      }
    }
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kUnpacked4) dot_nibbles<S, kFirst, kLast>(dot, w, x);
    else dot_signed<S, kFirst, kLast>(dot, w, x, book);
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    constexpr Source S = packed_source(T);
    for (int j = 0; j < 8; ++j, target += kLineBytes) {
      if constexpr (T == WeightType::kInt4) {
        _mm512_store_si512(target, load_nibbles<S>(lines, j));
      } else {
        const Signed codes = load_signed<S>(lines, j, book);
        _mm512_store_si512(target, codes.value);
        _mm512_store_si512(target + kPlane, codes.magnitude);
      }
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx512", 30, Avx512);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

namespace torch_int4 {
namespace {

constexpr Probes kProbes{kMaddubsAdd16_512, kFma512, kFma512, {kMaddubsMadd512, kMaddubsAdd16Only512}, nullptr};

}  // namespace
}  // namespace torch_int4

TI4_REGISTER(x86::has_avx512(), &kProbes)
#endif
