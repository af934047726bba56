// Shared by the two kernels of attention, and rotation and rounding of their operands; V are the vectors of
// loops/linear.h.
#pragma once
#include "kernels/loops/linear.h"
#include "kernels/loops/quantize.h"

namespace torch_int4 {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLowest = -3.402823466e38f;  // below it is only -inf

template <class V>
void loops_from_float(const float* source, int64_t count, DType dtype, bool clamp, void* target) {
  const auto low = V::set(-65504.f), high = V::set(65504.f);
  clamp = clamp && dtype == DType::kF16;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    auto x = V::load(source + i);
    if (clamp) x = V::min(high, V::max(low, x));  // the second operand stays where it is NaN
    V::store_as(static_cast<char*>(target) + i * element_bytes(dtype), dtype, x);
  }
  for (; i < count; ++i) {
    float x = source[i];
    if (clamp) x = x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x;
    store_element(target, dtype, i, x);
  }
}

template <class V>
void loops_rotate(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved) {
  const int64_t half = dim / 2;
  if (interleaved) {
    for (int64_t j = 0; j < half; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      x[2 * j] = a * cos[j] - b * sin[j];
      x[2 * j + 1] = b * cos[j] + a * sin[j];
    }
    return;
  }
  float* y = x + half;
  int64_t j = 0;
  for (; j + kLanes <= half; j += kLanes) {
    const auto a = V::load(x + j), b = V::load(y + j), c = V::load(cos + j), s = V::load(sin + j);
    V::store(x + j, V::sub(V::mul(a, c), V::mul(b, s)));
    V::store(y + j, V::add(V::mul(b, c), V::mul(a, s)));
  }
  for (; j < half; ++j) {
    const float a = x[j], b = y[j];
    x[j] = a * cos[j] - b * sin[j];
    y[j] = b * cos[j] + a * sin[j];
  }
}

template <class V>
struct Softmax {
  using F = typename V::F;
  using I = typename V::I;

  // e^x for x <= 0 to 1e-7: 2^n times a polynomial on |r| <= ln(2)/2; 0 below -87, NaN for NaN.
  static TI4_INLINE F exp(F x) {
    const I n = V::round(V::mul(x, V::set(1.44269504f)));
    F r = V::fnmadd(V::to_float(n), V::set(0.693145752f), x);  // ln(2) in two parts; 15 bits times n are exact
    r = V::fnmadd(V::to_float(n), V::set(1.42860677e-6f), r);
    F p = V::fmadd(V::set(1.3926213e-3f), r, V::set(8.3632030e-3f));
    p = V::fmadd(p, r, V::set(4.1666554e-2f));
    p = V::fmadd(p, r, V::set(1.6666577e-1f));
    p = V::fmadd(p, r, V::set(0.5f));
    p = V::fmadd(V::mul(p, r), r, r);
    const F power = V::as_float(V::shift_left(V::add_int(n, V::set_int(127)), 23));
    return V::where_less(x, V::set(-87.f), V::zero(), V::fmadd(p, power, power));
  }

  // cap * tanh(x / cap)
  static TI4_INLINE F soften(F x, float cap) {
    const F y = V::mul(x, V::set(2.f / cap)), negative = V::sub(V::zero(), y);
    const F e = exp(V::where_less(y, V::zero(), y, negative));
    const F t = V::mul(V::set(cap), V::div(V::sub(V::set(1.f), e), V::add(V::set(1.f), e)));
    return V::where_less(y, V::zero(), V::sub(V::zero(), t), t);
  }

  static TI4_INLINE F iota() {
    alignas(64) static const float lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return V::load(lanes);
  }
  static TI4_INLINE F hide_before(F index, F first, F score) {
    return V::where_less(index, first, V::set(kMinusInfinity), score);
  }
  static TI4_INLINE F hide_from(F index, F last, F score) {
    return V::where_less(index, last, score, V::set(kMinusInfinity));
  }
  // A score plus its bias; -inf hides the key even if the score is NaN.
  static TI4_INLINE F add_bias(F score, F bias) {
    return V::where_less(bias, V::set(kLowest), V::set(kMinusInfinity), V::add(score, bias));
  }
  static TI4_INLINE float reduce(F x, bool maximum) {
    alignas(64) float lanes[kLanes];
    V::store(lanes, x);
    float y = lanes[0];
    for (int i = 1; i < kLanes; ++i) y = !maximum ? y + lanes[i] : lanes[i] > y ? lanes[i] : y;
    return y;
  }
  // `count` floats, at most 16, and zeros.
  static TI4_INLINE F load_floats(const float* p, int64_t count) {
    if (count >= kLanes) return V::load(p);
    alignas(64) float lanes[kLanes] = {};
    memcpy(lanes, p, size_t(count) * sizeof(float));
    return V::load(lanes);
  }
};

inline int mask_bytes(MaskType type) { return type == MaskType::kBool ? 1 : type == MaskType::kF32 ? 4 : 2; }

inline DType mask_float(MaskType type) {
  return type == MaskType::kF32 ? DType::kF32 : type == MaskType::kBF16 ? DType::kBF16 : DType::kF16;
}

// The effect of a stretch of a mask on the keys under it.
enum MaskEffect { kHidesAll = 0, kShowsSome = 1, kChangesNothing = 2 };

// Keys [begin, begin + count) of a row of the mask as floats to add: -inf where the key is hidden, and that up to the
// next multiple of 16. The lowest number of the mask's own type counts as -inf.
template <class V>
MaskEffect load_mask(const void* mask, MaskType type, int64_t begin, int64_t count, float* bias) {
  using S = Softmax<V>;
  const char* source = static_cast<const char*>(mask) + begin * mask_bytes(type);
  if (type == MaskType::kBool) {
    const auto* shown = reinterpret_cast<const uint8_t*>(source);
    for (int64_t i = 0; i < count; ++i) bias[i] = shown[i] ? 0.f : kMinusInfinity;
  } else {
    loops_to_float<V>(source, mask_float(type), count, bias);
  }
  for (int64_t i = count; i < padded_lanes(count); ++i) bias[i] = kMinusInfinity;
  const float lowest = type == MaskType::kF16 ? -65504.f : type == MaskType::kBF16 ? -3.3895314e38f : kLowest;
  // Just above it: the comparison is strict.
  const auto limit = V::set(lowest * 0.9999999f), hidden = V::set(kMinusInfinity), one = V::set(1.f);
  auto seen = V::zero(), changed = V::zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto x = V::load(bias + i);
    const auto y = V::where_less(x, limit, hidden, x);
    V::store(bias + i, y);
    const auto is_hidden = V::where_less(y, V::set(kLowest), one, V::zero());
    const auto inside = V::where_less(S::iota(), V::set(float(count - i)), one, V::zero());
    seen = V::max(seen, V::sub(one, is_hidden));
    // Neither below nor above zero: zero; NaN is taken for a change.
    const auto not_zero = V::where_less(y, V::zero(), one, V::where_less(V::zero(), y, one, V::mul(y, V::zero())));
    changed = V::max(changed, V::mul(inside, V::where_less(not_zero, V::set(.5f), V::zero(), one)));
  }
  if (S::reduce(seen, true) == 0.f) return kHidesAll;
  return S::reduce(changed, true) == 0.f ? kChangesNothing : kShowsSome;
}

// Loads of a cache's elements, 16 at a time.
template <class V, CacheType C>
struct CacheLoads {
  using F = typename V::F;
  static constexpr int kBytes = C == CacheType::kF32 ? 4 : C == CacheType::kInt8 ? 1 : 2;
  static constexpr DType kType = C == CacheType::kF32    ? DType::kF32
                                 : C == CacheType::kBF16 ? DType::kBF16
                                                         : DType::kF16;

  static TI4_INLINE F load(const char* p) {
    if constexpr (C == CacheType::kInt8) return V::load_int8(p);
    else return V::load_as(p, kType);
  }
  // `count` elements, fewer than 16, and zeros.
  static TI4_INLINE F load_part(const char* p, int64_t count) {
    alignas(64) char part[kLanes * 4] = {};
    memcpy(part, p, size_t(count * kBytes));
    return load(part);
  }
  static TI4_INLINE float element(const char* p, int64_t i) {
    if constexpr (C == CacheType::kInt8) return float(reinterpret_cast<const int8_t*>(p)[i]);
    else return load_element(p, kType, i);
  }
};

// Whether a row may see a key; `bias` is what load_mask made of the row's mask there, or null.
inline bool sees(const AttentionRow& row, int64_t key, const float* bias) {
  return key >= row.first && key < row.last && !(bias && *bias < kLowest);
}

}  // namespace
}  // namespace torch_int4

#include "kernels/loops/attend_few.h"
#include "kernels/loops/attend_many.h"
