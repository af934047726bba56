// 16 lanes as one 512-bit vector: the V of loops/linear.h for the AVX-512 kernels.
#pragma once

namespace torch_int4 {
namespace {

struct Avx512Vectors {
  using F = __m512;
  using I = __m512i;
#define TI4_V static inline __attribute__((always_inline))
  TI4_V F zero() { return _mm512_setzero_ps(); }
  TI4_V F set(float x) { return _mm512_set1_ps(x); }
  TI4_V F load(const float* p) { return _mm512_loadu_ps(p); }
  TI4_V void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  TI4_V F add(F a, F b) { return _mm512_add_ps(a, b); }
  TI4_V F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  TI4_V F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  TI4_V F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  TI4_V F fnmadd(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  TI4_V I set_int(int x) { return _mm512_set1_epi32(x); }
  TI4_V I load_int(const void* p) { return _mm512_loadu_si512(p); }
  TI4_V I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  TI4_V I and_int(I a, I b) { return _mm512_and_si512(a, b); }
  TI4_V I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
  TI4_V I shift_right(I a, int n) { return _mm512_srli_epi32(a, unsigned(n)); }
  TI4_V I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, unsigned(n)); }
  TI4_V F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  TI4_V I round(F a) { return _mm512_cvtps_epi32(a); }
  TI4_V int reduce_max(I a) { return _mm512_reduce_max_epi32(a); }
  TI4_V int reduce_add(I a) { return _mm512_reduce_add_epi32(a); }
  TI4_V void store_int8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a)); }

  TI4_V F lookup(const float* values, I index) { return _mm512_permutexvar_ps(index, load(values)); }
  TI4_V I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  TI4_V I high_nibbles(I x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
  // The 4 activations at x in every lane.
  TI4_V I spread_quad(const int8_t* x) {
    int32_t quad;
    memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
  }

  // Bytes are shifted as parts of larger numbers: masks take away what came from their neighbours.
  using Bytes = __m512i;
  TI4_V Bytes load_bytes(const uint8_t* p) { return load_int(p); }
  TI4_V Bytes shift_bits_left(Bytes x, int n) { return shift_left(x, n); }
  TI4_V Bytes shift_bits_right(Bytes x, int n) { return shift_right(x, n); }
  TI4_V Bytes masked_bytes(Bytes x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi8(char(mask))); }

  // 64 nibbles (0..15, one per byte) through a table of 16 bytes.
  TI4_V I lookup_bytes(const void* table, I nibbles) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), nibbles);
  }
  TI4_V I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TI4_V F load_as(const void* p, DType dtype) {
    if (dtype == DType::kF32) return load(static_cast<const float*>(p));
    const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (dtype == DType::kF16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  // The upper 16 bits after rounding to nearest even; NaN is made quiet instead of rounded.
  TI4_V I round_bits(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const I quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16);
  }
  TI4_V F round_bfloat16(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(round_bits(x), 16)); }
  TI4_V void store_as(void* p, DType dtype, F x) {
    if (dtype == DType::kF32) return store(static_cast<float*>(p), x);
    const __m256i halves =
        dtype == DType::kF16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : _mm512_cvtepi32_epi16(round_bits(x));
    _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
  }

  // For attention.
  static constexpr int kScoreRows = 4, kValueVectors = 8;  // register tiles of attend_few
  static constexpr int kTilePanels = 2, kTileKeys = 8;     // and of attend_many
  TI4_V F max(F a, F b) { return _mm512_max_ps(a, b); }    // b where either is NaN
  TI4_V F min(F a, F b) { return _mm512_min_ps(a, b); }
  TI4_V F div(F a, F b) { return _mm512_div_ps(a, b); }
  TI4_V F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  TI4_V I shift_left(I a, int n) { return _mm512_slli_epi32(a, unsigned(n)); }
  TI4_V F as_float(I a) { return _mm512_castsi512_ps(a); }
  TI4_V F load_int8(const void* p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  // The sums of the lanes of four vectors.
  TI4_V void store_sums(float* p, const F (&x)[4]) {
    const F ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const F abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
  }
#undef TI4_V
};

}  // namespace
}  // namespace torch_int4
