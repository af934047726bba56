// Scalar conversions and the tail of a store, for every kernel file. Internal linkage: each file gets its own copy,
// compiled for its own ISA.
#pragma once
#include <string.h>

#include "kernels/kernel.h"

namespace torch_int4 {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 0x1p-24f;  // subnormal: exact
  return sign ? -magnitude : magnitude;
}

// Round to nearest even, as the hardware does; overflow gives infinity, NaN stays NaN.
inline uint16_t to_half(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // below 2^-14: let the float adder round to a multiple of 2^-24
    return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline float from_bfloat16(uint16_t h) { return bits_float(uint32_t(h) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float load_element(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(source)[i];
  const uint16_t h = static_cast<const uint16_t*>(source)[i];
  return dtype == DType::kF16 ? from_half(h) : from_bfloat16(h);
}

inline void store_element(void* target, DType dtype, int64_t i, float x) {
  if (dtype == DType::kF32) static_cast<float*>(target)[i] = x;
  else static_cast<uint16_t*>(target)[i] = dtype == DType::kF16 ? to_half(x) : to_bfloat16(x);
}

inline float round_to(DType dtype, float x) {
  return dtype == DType::kF32 ? x : dtype == DType::kF16 ? from_half(to_half(x)) : from_bfloat16(to_bfloat16(x));
}

// An element of the output: the rounded value, with the residual added.
inline void store_output(const Output& out, int64_t i, float y) {
  if (out.residual) y = load_element(out.residual, out.dtype, i) + round_to(out.dtype, y);
  store_element(out.data, out.dtype, i, y);
}

// Blocks of x whose largest magnitude is below this count as zero, so that the inverse scale cannot overflow.
constexpr float kTinyBlock = 0x1p-100f;

// A power of two from its biased exponent; 255 is NaN, 0 is the subnormal 2^-127.
inline float from_e8m0(uint8_t e) { return bits_float(e == 255 ? 0x7fc00000u : e ? uint32_t(e) << 23 : 0x00400000u); }

// Element i of a stream of scales, or of float offsets, which have the type of the scales.
inline float load_parameter(const void* stream, ScaleType type, int64_t i) {
  if (type == ScaleType::kE8M0) return from_e8m0(static_cast<const uint8_t*>(stream)[i]);
  return load_element(stream, type == ScaleType::kF32 ? DType::kF32 : DType::kF16, i);
}

// Of one row in one group: w = (q - zero) * scale + offset, where q is a code, or the value that a code book has for it.
struct GroupParameters {
  float scale, offset;
  int zero;
};

template <int kInputs>
inline float two_level_scale(const void* records, int64_t group, int64_t row) {
  using Record = TwoLevelScales<kInputs>;
  const Record& at = static_cast<const Record*>(records)[group / Record::kGroups];
  return from_half(at.scale[row]) * at.multipliers[group % Record::kGroups][row];
}

// Of element i, (panel * groups + group) * kPanelRows + row.
inline GroupParameters group_parameters(const PackedWeight& w, int64_t i) {
  const int64_t group = i / kPanelRows, row = i % kPanelRows;
  if (w.offset == Offset::kTwoLevel) {
    const TwoLevels& at = static_cast<const TwoLevels*>(w.scales)[group / TwoLevels::kGroups];
    const auto& multipliers = at.multipliers[group % TwoLevels::kGroups];
    return {from_half(at.scale[row]) * multipliers[0][row], from_half(at.offset[row]) * multipliers[1][row], 0};
  }
  if (w.offset == Offset::kTwoLevelScale)
    return {two_level_scale<kSlab>(w.scales, group, row), 0.f, zero_point(w.type)};
  if (w.offset == Offset::kTwoLevelHalves)
    return {two_level_scale<kHalf>(w.scales, group, row), 0.f, zero_point(w.type)};
  GroupParameters p{load_parameter(w.scales, w.scale_type, i), 0.f, 0};
  if (w.offset == Offset::kSymmetric) p.zero = zero_point(w.type);
  if (w.offset == Offset::kInteger) p.zero = static_cast<const uint8_t*>(w.offsets)[i];
  if (w.offset == Offset::kFloat) p.offset = load_parameter(w.offsets, w.scale_type, i);
  return p;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace torch_int4
