// AVX-VNNI (Alder Lake and later without AVX-512): dpbusd on 256-bit vectors.

#include "kernels/attention_kernel.h"
#include "kernels/kernel.h"
#include "kernels/scalar.h"
#include "kernels/simd_x86.h"

#ifdef TI4_X86
#include "kernels/probes/x86.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avxvnni")

#include "kernels/loops/attention.h"
#include "kernels/loops/block.h"
#include "kernels/loops/float.h"
#include "kernels/loops/linear.h"
#include "kernels/loops/quantize.h"
#include "kernels/vectors/avx2.h"
#include "kernels/vectors/dot_nibbles.h"

namespace torch_int4 {
namespace {

struct AvxVnni : Avx2Vectors, UnsignedCodes {
  static constexpr int kTileRows = 4, kTileWidth = 1, kPassRows = 128, kDirectRows = 2, kDirectRows8 = 2,
                       kDirectLimit = 8, kFloatRows = 6, kTurnSums = 4;
  static constexpr int kRowStreams = kStreams;
  static constexpr bool kOneSlab = false;

  template <Source S>
  static TI4_INLINE I load_codes(const uint8_t* w, int j, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kBookLines || is_split(S)) {
      const I line = load_int(w + j / 2 * kLineBytes);
      const I nibbles =
          j % 2 ? I{high_nibbles(line.lo), high_nibbles(line.hi)} : I{low_nibbles(line.lo), low_nibbles(line.hi)};
      if constexpr (S == Source::kInt4Lines) return nibbles;
      if constexpr (is_split(S)) {
        return {_mm256_or_si256(nibbles.lo, high_part<AvxVnni, S>(w, j, 0)),
                _mm256_or_si256(nibbles.hi, high_part<AvxVnni, S>(w, j, 32))};
      }
      return {lookup_bytes(book->codes, nibbles.lo), lookup_bytes(book->codes, nibbles.hi)};
    } else {
      return load_int(w + j * kLineBytes);
    }
  }

  static TI4_INLINE I load_line(const uint8_t* p) { return load_int(p); }
  static TI4_INLINE I dot4(I sum, I codes, const int8_t* x) {
    const __m256i quad = spread_quad(x);
    return {_mm256_dpbusd_avx_epi32(sum.lo, codes.lo, quad), _mm256_dpbusd_avx_epi32(sum.hi, codes.hi, quad)};
  }

  template <Source S, int kFirst, int kLast, int P, int M>
  static TI4_INLINE void dot(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines && M == 1) return dot_nibbles<AvxVnni, kFirst, kLast>(dot, w, x);
#pragma GCC unroll 8
    for (int j = kFirst; j < kLast; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const I codes = load_codes<S>(w[p], j, book);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) dot[p][m] = dot4(dot[p][m], codes, x + m * kSlab + j * 4);
      }
    }
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    if constexpr (high_bits(T) == 0)
      return spread_nibbles(lines, target, T == WeightType::kBook ? book->codes : nullptr);
    for (int j = 0; j < kQuads; ++j) {
      const I codes = load_codes<packed_source(T)>(lines, j, book);
      store256(target + j * kLineBytes, codes.lo);
      store256(target + j * kLineBytes + 32, codes.hi);
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx_vnni", 20, AvxVnni);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

namespace torch_int4 {
namespace {

constexpr Probes kProbes{kDpbusd256, kFma256, kFma256, {}, nullptr};

}  // namespace
}  // namespace torch_int4

TI4_REGISTER(x86::has_avx2() && x86::cpuid(7, 1, x86::kEax, 4), &kProbes)
#endif
