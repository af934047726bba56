// AVX2 + FMA + F16C. Weights stay unsigned (0..15) and activations signed: one maddubs pair is at most
// 2 * 15 * 127 = 3810, so eight of them add up exactly in int16 and one madd serves 32 inputs.
// Int8 weights run as two such planes, the low and the high nibble of each code.

#include "../attention_kernel.h"
#include "../kernel.h"
#include "scalar.h"
#include "simd.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c")

#include "avx2_vectors.h"
#include "loops_attention.h"
#include "loops_block.h"
#include "loops_float.h"
#include "loops_quantize.h"
#include "planes.h"

namespace torch_int4 {
namespace {

// The weights of 4 inputs, quad j of 32 inputs, at most 15 each. kNibble: the part of an 8-bit code.
struct Avx2Planes : Avx2Vectors {
  struct Int4 {
    static TI4_INLINE __m256i load(const uint8_t* w, int j, int half, const Codebook*) {
      const __m256i line = load256(w + j / 2 * kLineBytes + half * 32);
      return j % 2 ? high_nibbles(line) : low_nibbles(line);
    }
  };
  template <int kNibble>
  struct Int8 {
    static TI4_INLINE __m256i load(const uint8_t* w, int j, int half, const Codebook*) {
      const __m256i line = load256(w + j * kLineBytes + half * 32);
      return kNibble ? high_nibbles(line) : low_nibbles(line);
    }
  };
  template <int kNibble>
  struct Book {
    static TI4_INLINE __m256i load(const uint8_t* w, int j, int half, const Codebook* book) {
      return lookup_bytes(book->planes[kNibble], Int4::load(w, j, half, book));
    }
  };
  struct Unpacked {
    static TI4_INLINE __m256i load(const uint8_t* w, int j, int half, const Codebook*) {
      return load256(w + j * kLineBytes + half * 32);
    }
  };

  template <class Plane, int P, int M>
  static TI4_INLINE void dot(I (&sums)[P][M], const uint8_t* const (&w)[P], const int8_t* x, int factor,
                             const Codebook* book) {
    const __m256i weight = _mm256_set1_epi16(short(factor));
    __m256i low[P][M], high[P][M];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m256i w0 = Plane::load(w[p], j, 0, book), w1 = Plane::load(w[p], j, 1, book);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i b = spread_quad(x + m * kSlab + j * 4);
          const __m256i p0 = _mm256_maddubs_epi16(w0, b), p1 = _mm256_maddubs_epi16(w1, b);
          low[p][m] = j ? _mm256_add_epi16(low[p][m], p0) : p0;
          high[p][m] = j ? _mm256_add_epi16(high[p][m], p1) : p1;
          TI4_KEEP(low[p][m]);
          TI4_KEEP(high[p][m]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[p][m].lo = _mm256_add_epi32(sums[p][m].lo, _mm256_madd_epi16(low[p][m], weight));
        sums[p][m].hi = _mm256_add_epi32(sums[p][m].hi, _mm256_madd_epi16(high[p][m], weight));
      }
    }
  }
};

struct Avx2 : PlaneProducts<Avx2Planes, Avx2Vectors> {
  using Planes = Avx2Planes;
  static constexpr int kTileRows = 4, kDirectRows = 4, kDirectLimit = 12, kFloatRows = 6, kTurnSums = 4;
  static constexpr int kRowStreams = 4;

  // 32 inputs of a panel: int4 becomes one byte per weight, 8-bit codes the plane of their low nibbles and that of their
  // high ones.
  template <WeightType T>
  static TI4_INLINE void unpack(const uint8_t* lines, uint8_t* target, const Codebook* book) {
    constexpr int kPlane = kSlab * kPanelRows;
    if (T == WeightType::kInt4) return spread_nibbles(lines, target, nullptr);
    if (T == WeightType::kBook) {
      spread_nibbles(lines, target, book->planes[0]);
      return spread_nibbles(lines, target + kPlane, book->planes[1]);
    }
    for (int i = 0; i < kPlane; i += 32) {
      store256(target + i, low_nibbles(load256(lines + i)));
      store256(target + kPlane + i, high_nibbles(load256(lines + i)));
    }
  }
};

IsaKernels kernels = TI4_KERNELS("avx2", 10, Avx2);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx2)
