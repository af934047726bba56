// AVX-512 F/BW/DQ/VL without VNNI (Skylake-SP and kin): the int16 sums of avx2.cpp, one 512-bit vector for 16 rows.
#include <immintrin.h>

#include "../kernel.h"
#include "scalar.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#include "avx512_vectors.h"
#include "loops.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

// The weights of 4 inputs and 16 rows; quad j of 32 inputs.
struct Int4LinesPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j) {
    const __m512i line = _mm512_loadu_si512(w + j / 2 * kLineBytes);
    return _mm512_and_si512(j % 2 ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
  }
};

template <int kShift>
struct Int8LinesPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j) {
    const __m512i line = _mm512_loadu_si512(w + j * kLineBytes);
    return _mm512_and_si512(kShift ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
  }
};

struct UnpackedPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j) { return _mm512_loadu_si512(w + j * kLineBytes); }
};

struct Avx512 : Avx512Vectors {
  static constexpr int kTileRows = 8, kDirectRows = 4, kFloatRows = 14;

  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kSlab * kPanelRows * (T == WeightType::kInt4 ? 1 : 2);
  }

  // dot += weight * (the inner products of 32 inputs of one plane with M rows); weight is the int16 multiplier.
  template <class Plane, int M>
  static TI4_INLINE void dot_plane(I (&dot)[M], const uint8_t* w, const int8_t* x, __m512i weight) {
    __m512i sum[M];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i codes = Plane::load(w, j);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        int32_t quad;
        memcpy(&quad, x + m * kSlab + j * 4, 4);
        const __m512i product = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(quad));
        sum[m] = j ? _mm512_add_epi16(sum[m], product) : product;
        TI4_KEEP(sum[m]);
      }
    }
    for (int m = 0; m < M; ++m) dot[m] = _mm512_add_epi32(dot[m], _mm512_madd_epi16(sum[m], weight));
  }

  template <Source S, int M>
  static TI4_INLINE void dot32(I (&dot)[M], const uint8_t* w, const int8_t* x) {
    const __m512i one = _mm512_set1_epi16(1), sixteen = _mm512_set1_epi16(16);
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
    const __m512i mask = _mm512_set1_epi8(15);
    constexpr bool kInt4 = T == WeightType::kInt4;
    constexpr int kApart = kInt4 ? kLineBytes : kSlab * kPanelRows;
    for (int i = 0; i < slab_bytes(T); i += kLineBytes) {
      const __m512i line = _mm512_loadu_si512(lines + i);
      uint8_t* low = target + (kInt4 ? 2 * i : i);
      _mm512_store_si512(low, _mm512_and_si512(line, mask));
      _mm512_store_si512(low + kApart, _mm512_and_si512(_mm512_srli_epi16(line, 4), mask));
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx512", 30, Avx512);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx512)
