// Norms of rows and gated activations, over the vectors V of loops/linear.h.
#pragma once
#include "kernels/loops/attention.h"

namespace torch_int4 {
namespace {

template <class V>
TI4_INLINE typename V::F round_lanes(typename V::F x, DType dtype) {
  if (dtype == DType::kF32) return x;
  if (dtype == DType::kBF16) return V::round_bfloat16(x);
  alignas(64) uint16_t halves[kLanes];
  V::store_as(halves, dtype, x);
  return V::load_as(halves, dtype);
}

// Calls body(first, lanes) for `count` elements in steps of 16; lanes < 16 only in the last.
template <class Body>
TI4_INLINE void for_lanes(int64_t count, Body body) {
  for (int64_t i = 0; i < count; i += kLanes) body(i, smaller(kLanes, count - i));
}

template <class V>
TI4_INLINE void store_floats(float* p, int64_t count, typename V::F x) {
  if (count >= kLanes) return V::store(p, x);
  alignas(64) float lanes[kLanes];
  V::store(lanes, x);
  memcpy(p, lanes, size_t(count) * sizeof(float));
}

template <class V>
void loops_normalize(const float* x, int64_t count, const RowNorm& norm, float* y) {
  using S = Softmax<V>;
  auto mean = V::zero(), square = V::zero();
  if (norm.kind == Norm::kLayer) {
    for_lanes(count, [&](int64_t i, int64_t n) { mean = V::add(mean, S::load_floats(x + i, n)); });
    mean = V::set(S::reduce(mean, false) / float(count));
  }
  for_lanes(count, [&](int64_t i, int64_t n) {
    auto d = V::sub(S::load_floats(x + i, n), mean);
    if (n < kLanes) d = V::where_less(S::iota(), V::set(float(n)), d, V::zero());
    square = V::fmadd(d, d, square);
  });
  const auto factor = V::set(1.f / __builtin_sqrtf(S::reduce(square, false) / float(count) + norm.eps));
  const bool early = norm.kind == Norm::kRms && norm.offset == 0.f;
  const auto offset = V::set(norm.offset);
  for_lanes(count, [&](int64_t i, int64_t n) {
    auto z = V::mul(V::sub(S::load_floats(x + i, n), mean), factor);
    if (early) z = round_lanes<V>(z, norm.dtype);
    z = V::mul(z, V::add(S::load_floats(norm.weight + i, n), offset));
    if (norm.bias) z = V::add(z, S::load_floats(norm.bias + i, n));
    store_floats<V>(y + i, n, round_lanes<V>(z, norm.dtype));
  });
}

template <class V>
struct Activations {
  using F = typename V::F;
  using S = Softmax<V>;

  static TI4_INLINE F negative_magnitude(F x) {
    return V::where_less(x, V::zero(), x, V::sub(V::zero(), x));  // NaN stays NaN
  }
  // x / (1 + e^-t)
  static TI4_INLINE F sigmoid_product(F x, F t) {
    const F e = S::exp(negative_magnitude(t)), one = V::set(1.f);
    return V::div(V::where_less(t, V::zero(), V::mul(x, e), x), V::add(one, e));
  }
  // x times the normal distribution function, to 1e-7: erfc as in Abramowitz and Stegun 7.1.26.
  static TI4_INLINE F gelu(F x) {
    const F z = V::mul(negative_magnitude(x), V::set(-0.70710678f)), one = V::set(1.f);
    const F t = V::div(one, V::fmadd(V::set(0.3275911f), z, one));
    F p = V::fmadd(V::set(1.061405429f), t, V::set(-1.453152027f));
    p = V::fmadd(p, t, V::set(1.421413741f));
    p = V::fmadd(p, t, V::set(-0.284496736f));
    p = V::fmadd(p, t, V::set(0.254829592f));
    const F c = V::mul(V::mul(p, t), S::exp(V::fnmadd(z, z, V::zero())));
    return V::mul(V::mul(V::set(0.5f), x), V::where_less(x, V::zero(), c, V::sub(V::set(2.f), c)));
  }
  static TI4_INLINE F gelu_tanh(F x) {
    const F cube = V::mul(V::mul(x, x), x);
    return sigmoid_product(x, V::mul(V::set(1.59576912f), V::fmadd(V::set(0.044715f), cube, x)));
  }
  static TI4_INLINE F relu(F x) { return V::where_less(x, V::zero(), V::zero(), x); }
  static TI4_INLINE F at_most(F x, F limit) { return V::where_less(limit, x, limit, x); }
  static TI4_INLINE F clamped_swish(F x) {
    const F limited = at_most(x, V::set(kSwigluLimit));
    return sigmoid_product(limited, V::mul(V::set(kSwigluSlope), limited));
  }
  static TI4_INLINE F clamped_up(F x) {
    const F least = V::set(-kSwigluLimit), limited = at_most(x, V::set(kSwigluLimit));
    return V::add(V::where_less(limited, least, least, limited), V::set(1.f));
  }
  static TI4_INLINE F run(F x, Activation a) {
    switch (a) {
      case Activation::kSilu:
        return sigmoid_product(x, x);
      case Activation::kGelu:
        return gelu(x);
      case Activation::kGeluTanh:
        return gelu_tanh(x);
      case Activation::kClampedSwiglu:
        return clamped_swish(x);
      case Activation::kRelu:
        return relu(x);
      default:
        return V::mul(relu(x), relu(x));
    }
  }
};

template <class V>
void loops_gate(float* gate, const float* up, int64_t count, Activation activation, DType dtype) {
  using S = Softmax<V>;
  for_lanes(count, [&](int64_t i, int64_t n) {
    auto a = round_lanes<V>(Activations<V>::run(S::load_floats(gate + i, n), activation), dtype);
    if (up) {
      auto factor = S::load_floats(up + i, n);
      if (activation == Activation::kClampedSwiglu) {
        factor = round_lanes<V>(Activations<V>::clamped_up(factor), dtype);
      }
      a = round_lanes<V>(V::mul(a, factor), dtype);
    }
    store_floats<V>(gate + i, n, a);
  });
}

}  // namespace
}  // namespace torch_int4
