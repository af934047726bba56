// Quantization of the rows of x, and conversion to float, over the same vectors V as loops/linear.h.
#pragma once

namespace torch_int4 {
namespace {

template <class V>
void loops_to_float(const void* source, DType dtype, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kPanelRows <= count; i += kPanelRows) {
    V::store(target + i, V::load_as(static_cast<const char*>(source) + i * element_bytes(dtype), dtype));
  }
  for (; i < count; ++i) target[i] = load_element(source, dtype, i);
}

template <class V>
TI4_INLINE uint32_t largest_magnitude(const float* x, int64_t count) {
  // Integer maximum of the bits without the sign: NaN is above infinity and cannot get lost, as it would in max().
  auto largest = V::set_int(0);
  const auto mask = V::set_int(0x7fffffff);
  for (int64_t k = 0; k < count; k += kPanelRows) {
    largest = V::max_int(largest, V::and_int(V::load_int(x + k), mask));
  }
  return uint32_t(V::reduce_max(largest));
}

template <class V>
void loops_quantize(const float* x, int64_t count, int64_t block, const QuantizedRows& rows, int64_t row, int terms) {
  for (int64_t begin = 0, b = 0; begin < count; begin += block, ++b) {
    const int64_t end = smaller(begin + block, count);
    const uint32_t largest = largest_magnitude<V>(x + begin, end - begin);
    const float absmax = bits_float(largest);
    const bool finite = largest < 0x7f800000u, zero = !finite || absmax < kTinyBlock;
    const float scale = !finite ? bits_float(0x7fc00000u) : zero ? 0.f : absmax / 127.f;
    const float inverse = zero ? 0.f : 127.f / absmax;
    const auto vscale = V::set(scale), vinverse = V::set(inverse), vfine = V::set(inverse * 254.f);
    auto sum = V::set_int(0), fine_sum = V::set_int(0);
    for (int64_t k = begin; k < end; k += kPanelRows) {
      int8_t* target = rows.codes + ((k / kSlab) * rows.rows + row) * kSlab + k % kSlab;
      const auto value = zero ? V::zero() : V::load(x + k);
      const auto codes = V::round(V::mul(value, vinverse));
      V::store_int8(target, codes);
      sum = V::add_int(sum, codes);
      if (terms == 2) {
        const auto residual = zero ? V::zero() : V::fnmadd(V::to_float(codes), vscale, value);
        const auto fine = V::round(V::mul(residual, vfine));
        V::store_int8(target + kSlab, fine);
        fine_sum = V::add_int(fine_sum, fine);
      }
    }
    rows.set_block(b * rows.rows + row, scale, V::reduce_add(sum));
    if (terms == 2) rows.set_block(b * rows.rows + row + 1, scale / 254.f, V::reduce_add(fine_sum));
  }
}

}  // namespace
}  // namespace torch_int4
