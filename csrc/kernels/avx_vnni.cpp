// AVX-VNNI (Alder Lake and later without AVX-512): dpbusd on 256-bit vectors.

#include "../attention_kernel.h"
#include "../kernel.h"
#include "scalar.h"
#include "simd.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avxvnni")

#include "avx2_vectors.h"
#include "loops.h"
#include "loops_attention.h"
#include "loops_block.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

struct AvxVnni : Avx2Vectors {
  static constexpr int kTileRows = 4, kDirectRows = 2, kDirectLimit = 8, kFloatRows = 6, kTurnSums = 4;

  // Int8 lines are what dpbusd reads: they stay where they are.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return T == WeightType::kInt8 ? 0 : kSlab * kPanelRows;
  }

  template <Source S>
  static TI4_INLINE __m256i load_codes(const uint8_t* w, int j, int half, const Codebook* book) {
    if constexpr (S == Source::kInt4Lines || S == Source::kBookLines) {
      const __m256i line = load256(w + j / 2 * kLineBytes + half * 32);
      const __m256i nibbles = j % 2 ? high_nibbles(line) : low_nibbles(line);
      return S == Source::kBookLines ? lookup_bytes(book->planes[2], nibbles) : nibbles;
    } else {
      return load256(w + j * kLineBytes + half * 32);
    }
  }

  template <Source S, int P, int M>
  static TI4_INLINE void dot32(I (&dot)[P][M], const uint8_t* const (&w)[P], const int8_t* x, const Codebook* book) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m256i low = load_codes<S>(w[p], j, 0, book), high = load_codes<S>(w[p], j, 1, book);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i b = spread_quad(x + m * kSlab + j * 4);
          dot[p][m].lo = _mm256_dpbusd_avx_epi32(dot[p][m].lo, low, b);
          dot[p][m].hi = _mm256_dpbusd_avx_epi32(dot[p][m].hi, high, b);
        }
      }
    }
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    spread_nibbles(lines, target, T == WeightType::kBook ? book->planes[2] : nullptr);
  }
};

IsaKernels kernels = TI4_KERNELS("avx_vnni", 20, AvxVnni);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx_vnni)
