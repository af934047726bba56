// AVX2 + FMA + F16C. Int4 weights stay unsigned (0..15) and activations signed: one maddubs pair is at most 2 * 15 *
// 127 = 3810, so eight of them add up exactly in int16 and one madd serves 32 inputs. Codes of 8 bits are taken less
// 128, and their signs moved to the activations: a pair is at most 2 * 128 * 127 = 32512.

#include "kernels/attention_kernel.h"
#include "kernels/kernel.h"
#include "kernels/scalar.h"
#include "kernels/simd_x86.h"

#ifdef TI4_X86
#include "kernels/probes/x86.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c")

#include "kernels/loops/attention.h"
#include "kernels/loops/block.h"
#include "kernels/loops/float.h"
#include "kernels/loops/linear.h"
#include "kernels/loops/quantize.h"
#include "kernels/vectors/avx2.h"

namespace torch_int4 {
namespace {

struct Avx2 : Avx2Vectors, SignedPlanes {
  static constexpr int kTileRows = 4, kTileWidth = 1, kPassRows = 128, kDirectRows = 5, kDirectRows8 = 4,
                       kDirectLimit = 12, kFloatRows = 6, kTurnSums = 4;
  static constexpr int kRowStreams = 4;
  static constexpr bool kOneSlab = true;

  // The weights of 4 inputs, quad j of 32 inputs, for half of the panel; at most 15 each.
  template <Source S>
  static TI4_INLINE __m256i load_nibbles(const uint8_t* w, int j, int half) {
    if (S == Source::kUnpacked4) return load256(w + j * kLineBytes + half * 32);
    const __m256i line = load256(w + j / 2 * kLineBytes + half * 32);
    return j % 2 ? high_nibbles(line) : low_nibbles(line);
  }

  struct Signed {
    __m256i value, magnitude;
  };
  template <Source S>
  static TI4_INLINE Signed load_signed(const uint8_t* w, int j, int half, const Codebook* book) {
    const uint8_t* place = w + j * kLineBytes + half * 32;
    if constexpr (S == Source::kUnpacked8) return {load256(place), load256(place + kPlane)};
    if constexpr (is_split(S)) {
      const __m256i codes = _mm256_or_si256(load_nibbles<S>(w, j, half), high_part<Avx2, S>(w, j, half * 32));
      const __m256i centred = _mm256_sub_epi8(codes, _mm256_set1_epi8(zero_point(split_type(S))));
      return {centred, _mm256_abs_epi8(centred)};
    }
    const __m256i value = S == Source::kBookLines ? lookup_bytes(book->weights, load_nibbles<S>(w, j, half))
                                                  : _mm256_xor_si256(load256(place), _mm256_set1_epi8(-128));
    return {value, _mm256_abs_epi8(value)};
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot_nibbles(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x) {
    __m256i low[P][M], high[P][M];
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m256i w0 = load_nibbles<S>(w[p], j, 0), w1 = load_nibbles<S>(w[p], j, 1);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i b = spread_quad(x + m * kSlab + j * 4);
          const __m256i p0 = _mm256_maddubs_epi16(w0, b), p1 = _mm256_maddubs_epi16(w1, b);
          low[p][m] = j > kFirst ? _mm256_add_epi16(low[p][m], p0) : p0;
          high[p][m] = j > kFirst ? _mm256_add_epi16(high[p][m], p1) : p1;
          TI4_KEEP(low[p][m]);
          TI4_KEEP(high[p][m]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) add_pairs(dot[p][m].lo, low[p][m]), add_pairs(dot[p][m].hi, high[p][m]);
    }
  }

  static TI4_INLINE void add_pairs(__m256i& sum, __m256i pairs) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot_signed(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x,
                                    const Codebook* book) {
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        add_signed<0>(dot[p], load_signed<S>(w[p], j, 0, book), x + j * 4);
        const int8_t* quads = x + j * 4;
        if (S == Source::kBookLines && M > 2) TI4_FORGET(quads);  // no register is left for what was loaded from there
        add_signed<1>(dot[p], load_signed<S>(w[p], j, 1, book), quads);
      }
    }
  }

  template <int kHalf, int M>
  static TI4_INLINE void add_signed(I (&dot)[M], Signed w, const int8_t* x) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m256i& sum = kHalf ? dot[m].hi : dot[m].lo;
      add_pairs(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(spread_quad(x + m * kSlab), w.value)));
      TI4_KEEP(sum);
    }
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kUnpacked4) dot_nibbles<S, kFirst, kLast>(dot, w, x);
    else dot_signed<S, kFirst, kLast>(dot, w, x, book);
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    if constexpr (T == WeightType::kInt4) return spread_nibbles(lines, target, nullptr);
    for (int i = 0; i < kPlane; i += 32) {
      const Signed codes = load_signed<packed_source(T)>(lines, i / kLineBytes, i % kLineBytes / 32, book);
      store256(target + i, codes.value);
      store256(target + kPlane + i, codes.magnitude);
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx2", 10, Avx2);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

namespace torch_int4 {
namespace {

constexpr Probes kProbes{
    kMaddubsAdd16_256, kFma256, kFma256, {kMaddubsMadd256, kMaddubsAdd16Only256, kIssue}, read_256};

}  // namespace
}  // namespace torch_int4

TI4_REGISTER(x86::has_avx2(), &kProbes)
#endif
