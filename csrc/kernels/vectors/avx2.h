// 16 lanes as two 256-bit vectors: the V of loops/linear.h for AVX2 and AVX-VNNI.
#pragma once

namespace torch_int4 {
namespace {

inline __attribute__((always_inline)) __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

struct Avx2Vectors {
  struct F {
    __m256 lo, hi;
  };
  struct I {
    __m256i lo, hi;
  };
#define TI4_V static inline __attribute__((always_inline))
  TI4_V F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  TI4_V F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  TI4_V F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  TI4_V void store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
  }
  TI4_V F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  TI4_V F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  TI4_V F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  TI4_V F fmadd(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  TI4_V F fnmadd(F a, F b, F c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }

  TI4_V I set_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  TI4_V I load_int(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
  TI4_V I add_int(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  TI4_V I and_int(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  TI4_V I max_int(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
  TI4_V I shift_right(I a, int n) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
  TI4_V I shift_right_signed(I a, int n) { return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)}; }
  TI4_V F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  TI4_V I round(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }

  TI4_V int reduce_max(I a) {
    alignas(32) int v[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(v), _mm256_max_epi32(a.lo, a.hi));
    int largest = v[0];
    for (int i = 1; i < 8; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
  }
  TI4_V int reduce_add(I a) {
    const __m256i x = _mm256_add_epi32(a.lo, a.hi);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  TI4_V void store_int8(int8_t* p, I a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  TI4_V __m256 lookup8(__m256 low, __m256 high, __m256i index) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign, which blendv reads
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
  }
  TI4_V F lookup(const float* values, I index) {
    const F table = load(values);
    return {lookup8(table.lo, table.hi, index.lo), lookup8(table.lo, table.hi, index.hi)};
  }
  // 32 nibbles (0..15, one per byte) through a table of 16 bytes.
  TI4_V __m256i lookup_bytes(const void* table, __m256i nibbles) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), nibbles);
  }
  TI4_V I load_u8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }

  TI4_V __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  TI4_V __m256 widen_bfloat16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  TI4_V F load_as(const void* p, DType dtype) {
    if (dtype == DType::kF32) return load(static_cast<const float*>(p));
    const __m128i a = load128(p), b = load128(static_cast<const char*>(p) + 16);
    if (dtype == DType::kF16) return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
    return {widen_bfloat16(a), widen_bfloat16(b)};
  }

  // The upper 16 bits after rounding to nearest even; NaN is made quiet instead of rounded.
  TI4_V __m256i round_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  }
  TI4_V F round_bfloat16(F x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(round_bits(x.lo), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(round_bits(x.hi), 16))};
  }
  TI4_V void store_as(void* p, DType dtype, F x) {
    if (dtype == DType::kF32) return store(static_cast<float*>(p), x);
    __m256i halves;
    if (dtype == DType::kF16) {
      halves = _mm256_set_m128i(_mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT),
                                _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
    } else {
      halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bits(x.lo), round_bits(x.hi)), 0xd8);
    }
    _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
  }

  // Bytes are shifted as parts of larger numbers: masks take away what came from their neighbours.
  using Bytes = __m256i;
  TI4_V Bytes load_bytes(const uint8_t* p) { return load256(p); }
  TI4_V Bytes shift_bits_left(Bytes x, int n) { return _mm256_slli_epi32(x, n); }
  TI4_V Bytes shift_bits_right(Bytes x, int n) { return _mm256_srli_epi32(x, n); }
  TI4_V Bytes masked_bytes(Bytes x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi8(char(mask))); }

  TI4_V void store256(uint8_t* p, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
  TI4_V __m256i low_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  // The 4 activations at x in every lane.
  TI4_V __m256i spread_quad(const int8_t* x) {
    int32_t quad;
    memcpy(&quad, x, 4);
    return _mm256_set1_epi32(quad);
  }

  TI4_V __m256i high_nibbles(__m256i x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

  // 32 inputs of a panel in nibbles to a byte each, through a table of 16 bytes if there is one.
  TI4_V void spread_nibbles(const uint8_t* lines, uint8_t* target, const uint8_t* table) {
    for (int i = 0; i < kSlab * kPanelRows / 2; i += 32) {
      const __m256i line = load256(lines + i);
      __m256i low = low_nibbles(line), high = high_nibbles(line);
      if (table) low = lookup_bytes(table, low), high = lookup_bytes(table, high);
      uint8_t* place = target + i / kLineBytes * kLineBytes + i;
      store256(place, low);
      store256(place + kLineBytes, high);
    }
  }

  // For attention.
  static constexpr int kScoreRows = 1, kValueVectors = 4;  // register tiles of attend_few
  static constexpr int kTilePanels = 1, kTileKeys = 6;     // and of attend_many
  TI4_V F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }  // b where either is NaN
  TI4_V F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  TI4_V F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  TI4_V F where_less(F a, F b, F yes, F no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
  }
  TI4_V I shift_left(I a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
  TI4_V F as_float(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
  TI4_V F load_int8(const void* p) {
    const __m128i bytes = load128(p);
    return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
  }
  // The sums of the lanes of four vectors.
  TI4_V void store_sums(float* p, const F (&x)[4]) {
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(x[0].lo, x[0].hi), _mm256_add_ps(x[1].lo, x[1].hi));
    const __m256 cd = _mm256_hadd_ps(_mm256_add_ps(x[2].lo, x[2].hi), _mm256_add_ps(x[3].lo, x[3].hi));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
#undef TI4_V
};

}  // namespace
}  // namespace torch_int4
