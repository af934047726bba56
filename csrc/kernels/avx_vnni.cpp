// AVX-VNNI (Alder Lake and later without AVX-512): dpbusd on 256-bit vectors.
#include <immintrin.h>

#include "../kernel.h"
#include "scalar.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")

#include "avx2_vectors.h"
#include "loops.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

struct AvxVnni : Avx2Vectors {
  static constexpr int kTileRows = 4, kDirectRows = 2, kFloatRows = 6;

  // Int8 lines are what dpbusd reads: they stay where they are.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return T == WeightType::kInt4 ? kSlab * kPanelRows : 0;
  }

  template <Source S>
  static TI4_INLINE __m256i load_codes(const uint8_t* w, int j, int half) {
    if constexpr (S == Source::kInt4Lines) {
      const __m256i line = load256(w + j / 2 * kLineBytes + half * 32);
      return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
    } else {
      return load256(w + j * kLineBytes + half * 32);
    }
  }

  template <Source S, int M>
  static TI4_INLINE void dot32(I (&dot)[M], const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i low = load_codes<S>(w, j, 0), high = load_codes<S>(w, j, 1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        int32_t quad;
        memcpy(&quad, x + m * kSlab + j * 4, 4);
        const __m256i b = _mm256_set1_epi32(quad);
        dot[m].lo = _mm256_dpbusd_avx_epi32(dot[m].lo, low, b);
        dot[m].hi = _mm256_dpbusd_avx_epi32(dot[m].hi, high, b);
      }
    }
  }

  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target) {
    unpack_nibbles(lines, target, slab_bytes(T), kLineBytes);
  }
};

IsaKernels kernels = TI4_KERNELS("avx_vnni", 20, AvxVnni);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx_vnni)
