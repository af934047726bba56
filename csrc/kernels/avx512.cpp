// AVX-512 F/BW/DQ/VL without VNNI (Skylake-SP and kin): the int16 sums of avx2.cpp, one 512-bit vector for 16 rows.

#include "../attention_kernel.h"
#include "../kernel.h"
#include "scalar.h"
#include "simd.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#include "avx512_vectors.h"
#include "loops_attention.h"
#include "loops_block.h"
#include "loops_float.h"
#include "loops_quantize.h"
#include "planes.h"

namespace torch_int4 {
namespace {

// The weights of 4 inputs, quad j of 32 inputs, at most 15 each. kNibble: the part of an 8-bit code.
struct Avx512Planes : Avx512Vectors {
  struct Int4 {
    static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) {
      const __m512i line = load_int(w + j / 2 * kLineBytes);
      return j % 2 ? high_nibbles(line) : low_nibbles(line);
    }
  };
  template <int kNibble>
  struct Int8 {
    static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) {
      const __m512i line = load_int(w + j * kLineBytes);
      return kNibble ? high_nibbles(line) : low_nibbles(line);
    }
  };
  template <int kNibble>
  struct Book {
    static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook* book) {
      return lookup_bytes(book->planes[kNibble], Int4::load(w, j, book));
    }
  };
  struct Unpacked {
    static TI4_INLINE __m512i load(const uint8_t* w, int j, const Codebook*) { return load_int(w + j * kLineBytes); }
  };

  template <class Plane, int P, int M>
  static TI4_INLINE void dot(I (&sums)[P][M], const uint8_t* const (&w)[P], const int8_t* x, int factor,
                             const Codebook* book) {
    const __m512i weight = _mm512_set1_epi16(short(factor));
    __m512i sum[P][M];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512i codes = Plane::load(w[p], j, book);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const __m512i product = _mm512_maddubs_epi16(codes, spread_quad(x + m * kSlab + j * 4));
          sum[p][m] = j ? _mm512_add_epi16(sum[p][m], product) : product;
          TI4_KEEP(sum[p][m]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[p][m] = _mm512_add_epi32(sums[p][m], _mm512_madd_epi16(sum[p][m], weight));
    }
  }
};

struct Avx512 : PlaneProducts<Avx512Planes, Avx512Vectors> {
  using Planes = Avx512Planes;
  static constexpr int kTileRows = 8, kDirectRows = 4, kDirectLimit = 12, kFloatRows = 14, kTurnSums = 8;
  static constexpr int kRowStreams = kStreams;

  // 32 inputs of a panel: int4 becomes one byte per weight, 8-bit codes the plane of their low nibbles and that of their
  // high ones.
  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    uint8_t* upper = target + kSlab * kPanelRows;
    for (int j = 0; j < 8; ++j, target += kLineBytes, upper += kLineBytes) {
      if constexpr (T == WeightType::kInt4) {
        _mm512_store_si512(target, Planes::Int4::load(lines, j, book));
      } else {
        constexpr bool kBook = T == WeightType::kBook;
        _mm512_store_si512(target,
                           kBook ? Planes::Book<0>::load(lines, j, book) : Planes::Int8<0>::load(lines, j, book));
        _mm512_store_si512(upper,
                           kBook ? Planes::Book<1>::load(lines, j, book) : Planes::Int8<1>::load(lines, j, book));
      }
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx512", 30, Avx512);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx512)
