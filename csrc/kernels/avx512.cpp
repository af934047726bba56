// AVX-512 F/BW/DQ/VL without VNNI (Skylake-SP and kin): the int16 sums of avx2.cpp, one 512-bit vector for 16 rows.

#include "../kernel.h"
#include "scalar.h"
#include "simd.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#include "avx512_vectors.h"
#include "loops.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

TI4_INLINE __m512i low_nibbles(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
TI4_INLINE __m512i high_nibbles(__m512i x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// The weights of 4 inputs and 16 rows, at most 15 each; quad j of 32 inputs. kNibble: the part of an 8-bit code.
struct Int4LinesPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) {
    const __m512i line = _mm512_loadu_si512(w + j / 2 * kLineBytes);
    return j % 2 ? high_nibbles(line) : low_nibbles(line);
  }
};

template <int kNibble>
struct Int8LinesPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) {
    const __m512i line = _mm512_loadu_si512(w + j * kLineBytes);
    return kNibble ? high_nibbles(line) : low_nibbles(line);
  }
};

template <int kNibble>
struct BookLinesPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook* book) {
    return Avx512Vectors::lookup_bytes(book->planes[kNibble], Int4LinesPlane::load(w, j, book));
  }
};

struct UnpackedPlane {
  static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) {
    return _mm512_loadu_si512(w + j * kLineBytes);
  }
};

template <WeightType T>
struct PlaneOf {
  using Low = Int8LinesPlane<0>;
  using High = Int8LinesPlane<1>;
};
template <>
struct PlaneOf<WeightType::kBook> {
  using Low = BookLinesPlane<0>;
  using High = BookLinesPlane<1>;
};

struct Avx512 : Avx512Vectors {
  static constexpr int kTileRows = 8, kDirectRows = 4, kFloatRows = 14;

  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kSlab * kPanelRows * (T == WeightType::kInt4 ? 1 : 2);
  }

  // dot += weight * (the inner products of 32 inputs of one plane with M rows); weight is the int16 multiplier.
  template <class Plane, int M>
  static TI4_INLINE void dot_plane(I (&dot)[M], const uint8_t* w, const int8_t* x, __m512i weight,
                                   const Codebook* book) {
    __m512i sum[M];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i codes = Plane::load(w, j, book);
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

  template <class Low, class High, int M>
  static TI4_INLINE void dot_planes(I (&dot)[M], const uint8_t* low, const uint8_t* high, const int8_t* x,
                                    const Codebook* book) {
    dot_plane<Low, M>(dot, low, x, _mm512_set1_epi16(1), book);
    TI4_KEEP_MEMORY();
    dot_plane<High, M>(dot, high, x, _mm512_set1_epi16(16), book);
  }

  template <Source S, int M>
  static TI4_INLINE void dot32(I (&dot)[M], const uint8_t* w, const int8_t* x, const Codebook* book) {
    const __m512i one = _mm512_set1_epi16(1);
    if constexpr (S == Source::kInt4Lines) dot_plane<Int4LinesPlane, M>(dot, w, x, one, book);
    if constexpr (S == Source::kUnpacked4) dot_plane<UnpackedPlane, M>(dot, w, x, one, book);
    if constexpr (S == Source::kInt8Lines) dot_planes<Int8LinesPlane<0>, Int8LinesPlane<1>, M>(dot, w, w, x, book);
    if constexpr (S == Source::kBookLines) dot_planes<BookLinesPlane<0>, BookLinesPlane<1>, M>(dot, w, w, x, book);
    if constexpr (S == Source::kUnpacked8) {
      dot_planes<UnpackedPlane, UnpackedPlane, M>(dot, w, w + kSlab * kPanelRows, x, book);
    }
  }

  // 32 inputs of a panel: int4 becomes one byte per weight, 8-bit codes the plane of their low nibbles and that of their
  // high ones.
  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    uint8_t* upper = target + kSlab * kPanelRows;
    for (int j = 0; j < 8; ++j, target += kLineBytes, upper += kLineBytes) {
      if constexpr (T == WeightType::kInt4) {
        _mm512_store_si512(target, Int4LinesPlane::load(lines, j, book));
      } else {
        using Low = typename PlaneOf<T>::Low;
        using High = typename PlaneOf<T>::High;
        _mm512_store_si512(target, Low::load(lines, j, book));
        _mm512_store_si512(upper, High::load(lines, j, book));
      }
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx512", 30, Avx512);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx512)
