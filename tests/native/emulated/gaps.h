// Intrinsics of the kernels that SIMDe 0.8.2 lacks or that it gets wrong, after Intel's description of each. A kernel
// that uses another one does not compile here: add it.
#pragma once
#include <stdint.h>
#include <string.h>

namespace emulated {

// gcc drops the alignment of a vector type that is a template argument; nothing here depends on it.
#pragma GCC diagnostic ignored "-Wignored-attributes"

// The lanes of a vector, as numbers of type T.
template <class T, class Vector>
struct Lanes {
  static constexpr int kCount = int(sizeof(Vector) / sizeof(T));
  T lane[kCount];

  Lanes() = default;
  explicit Lanes(Vector vector) { memcpy(lane, &vector, sizeof lane); }
  Vector vector() const {
    Vector result;
    memcpy(&result, lane, sizeof result);
    return result;
  }
};

// Lane by lane from type A to type B; wider or narrower by the rules of C, that is, by extension or truncation.
template <class A, class B, class To, class From>
inline To convert(From source) {
  const Lanes<A, From> a(source);
  Lanes<B, To> b;
  static_assert(a.kCount == b.kCount, "as many lanes");
  for (int i = 0; i < a.kCount; ++i) b.lane[i] = B(a.lane[i]);
  return b.vector();
}

struct Halves {
  __m256i low, high;
  explicit Halves(simde__m512i vector) { memcpy(this, &vector, sizeof *this); }
};

inline simde__m512i join(__m256i low, __m256i high) {
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

inline int reduce_add(simde__m512i vector) {
  uint32_t sum = 0;  // wraps, as the instruction does
  for (const uint32_t lane : Lanes<uint32_t, simde__m512i>(vector).lane) sum += lane;
  return int(sum);
}

// Four unsigned times four signed bytes per lane, without saturation: even and odd bytes as 16-bit pairs.
inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

inline simde__m512i dpbusd(simde__m512i sum, simde__m512i a, simde__m512i b) {
  const Halves c(sum), p(a), q(b);
  return join(dpbusd(c.low, p.low, q.low), dpbusd(c.high, p.high, q.high));
}

template <int kRounding>
inline __m256i to_half(simde__m512 x) {
  const Halves bits(simde_mm512_castps_si512(x));
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_castsi256_ps(bits.high), kRounding),
                          _mm256_cvtps_ph(_mm256_castsi256_ps(bits.low), kRounding));
}

}  // namespace emulated

#define _mm512_cvtepi8_epi32(x) (emulated::convert<int8_t, int32_t, simde__m512i, simde__m128i>(x))
#define _mm512_cvtepu8_epi32(x) (emulated::convert<uint8_t, int32_t, simde__m512i, simde__m128i>(x))
#define _mm512_cvtepi32_epi16(x) (emulated::convert<uint32_t, uint16_t, simde__m256i, simde__m512i>(x))
#define _mm512_broadcast_i32x8(x) (emulated::join((x), (x)))
#define _mm512_reduce_add_epi32(x) (emulated::reduce_add(x))
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) (emulated::to_half<(rounding)>(x))

// The first is missing under this name; SIMDe's second takes minutes to compile in a register tile.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_dpbusd_epi32
#define _mm256_dpbusd_avx_epi32(sum, a, b) (emulated::dpbusd((sum), (a), (b)))
#define _mm512_dpbusd_epi32(sum, a, b) (emulated::dpbusd((sum), (a), (b)))

// Wrong in SIMDe 0.8.2: its masked stores write zeros to the other lanes, its masked loads touch their memory, and its
// bfloat16 products add in another order. Without the names a kernel that uses them does not compile.
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#undef _mm512_mask_loadu_ps
#undef _mm512_mask_loadu_epi16
#undef _mm512_mask_loadu_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi16
#undef _mm512_dpbf16_ps
