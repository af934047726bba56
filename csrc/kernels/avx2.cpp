// AVX2 + FMA + F16C. Weights stay unsigned (0..15) and activations signed: one maddubs pair is at most
// 2 * 15 * 127 = 3810, so eight of them add up exactly in int16 and one madd serves 32 inputs.
// Int8 weights run as two such planes, the low and the high nibble of each code.
#include <immintrin.h>

#include "../kernel.h"
#include "scalar.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "avx2_vectors.h"
#include "loops.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

// The weights of 4 inputs, 8 rows a vector; quad j of 32 inputs.
struct Int4LinesPlane {
  static TI4_INLINE __m256i load(const uint8_t* w, int j, int half) {
    const __m256i line = load256(w + j / 2 * kLineBytes + half * 32);
    return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
  }
};

template <int kShift>
struct Int8LinesPlane {
  static TI4_INLINE __m256i load(const uint8_t* w, int j, int half) {
    const __m256i line = load256(w + j * kLineBytes + half * 32);
    return _mm256_and_si256(kShift ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
  }
};

struct UnpackedPlane {
  static TI4_INLINE __m256i load(const uint8_t* w, int j, int half) { return load256(w + j * kLineBytes + half * 32); }
};

struct Avx2 : Avx2Vectors {
  static constexpr int kTileRows = 3, kDirectRows = 2, kFloatRows = 6;

  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kSlab * kPanelRows * (T == WeightType::kInt4 ? 1 : 2);
  }

  // dot += weight * (the inner products of 32 inputs of one plane with M rows); weight is the int16 multiplier.
  template <class Plane, int M>
  static TI4_INLINE void dot_plane(I (&dot)[M], const uint8_t* w, const int8_t* x, __m256i weight) {
    __m256i low[M], high[M];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i w0 = Plane::load(w, j, 0), w1 = Plane::load(w, j, 1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        int32_t quad;
        memcpy(&quad, x + m * kSlab + j * 4, 4);
        const __m256i b = _mm256_set1_epi32(quad);
        const __m256i p0 = _mm256_maddubs_epi16(w0, b), p1 = _mm256_maddubs_epi16(w1, b);
        low[m] = j ? _mm256_add_epi16(low[m], p0) : p0;
        high[m] = j ? _mm256_add_epi16(high[m], p1) : p1;
        TI4_KEEP(low[m]);
        TI4_KEEP(high[m]);
      }
    }
    for (int m = 0; m < M; ++m) {
      dot[m].lo = _mm256_add_epi32(dot[m].lo, _mm256_madd_epi16(low[m], weight));
      dot[m].hi = _mm256_add_epi32(dot[m].hi, _mm256_madd_epi16(high[m], weight));
    }
  }

  template <Source S, int M>
  static TI4_INLINE void dot32(I (&dot)[M], const uint8_t* w, const int8_t* x) {
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    if constexpr (S == Source::kInt4Lines) dot_plane<Int4LinesPlane, M>(dot, w, x, one);
    if constexpr (S == Source::kUnpacked4) dot_plane<UnpackedPlane, M>(dot, w, x, one);
    if constexpr (S == Source::kInt8Lines) {
      dot_plane<Int8LinesPlane<0>, M>(dot, w, x, one);
      TI4_KEEP_MEMORY();
      dot_plane<Int8LinesPlane<4>, M>(dot, w, x, sixteen);
    }
    if constexpr (S == Source::kUnpacked8) {
      dot_plane<UnpackedPlane, M>(dot, w, x, one);
      TI4_KEEP_MEMORY();
      dot_plane<UnpackedPlane, M>(dot, w + kSlab * kPanelRows, x, sixteen);
    }
  }

  // 32 inputs of a panel: int4 becomes one byte per weight, int8 the plane of low and the plane of high nibbles.
  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target) {
    if (T == WeightType::kInt4) unpack_nibbles(lines, target, slab_bytes(T), kLineBytes);
    else unpack_nibbles(lines, target, slab_bytes(T), kSlab * kPanelRows);
  }
};

IsaKernels kernels = TI4_KERNELS("avx2", 10, Avx2);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx2)
