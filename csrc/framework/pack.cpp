#include "framework/pack.h"

#include <math.h>
#include <string.h>

#include "kernels/scalar.h"

namespace torch_int4 {
namespace {

// Copies elements between [out_features][groups] and [panels][groups][16].
template <class Move>
void each_parameter(const PackedWeight& shape, Move move) {
  for (int64_t n = 0; n < shape.out_features; ++n) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      move(n * shape.groups + g, (n / kPanelRows * shape.groups + g) * kPanelRows + n % kPanelRows);
    }
  }
}

}  // namespace

void pack_codes(const uint8_t* codes, const PackedWeight& shape, int64_t first, int64_t last, uint8_t* packed) {
  memset(packed + first * shape.panel_bytes(), 0, size_t((last - first) * shape.panel_bytes()));
  with_type(shape.type, [&](auto type) {
    for (int64_t n = first * kPanelRows; n < smaller(last * kPanelRows, shape.out_features); ++n) {
      uint8_t* panel = packed + n / kPanelRows * shape.panel_bytes();
      for (int64_t k = 0; k < shape.in_features; ++k) {
        const Place at = place_of(type, int(n % kPanelRows), k);
        panel[at.byte] |= uint8_t(codes[n * shape.in_features + k] << at.shift);
      }
    }
  });
}

void unpack_codes(const PackedWeight& w, int64_t first, int64_t last, uint8_t* codes) {
  with_type(w.type, [&](auto type) {
    for (int64_t n = first * kPanelRows; n < smaller(last * kPanelRows, w.out_features); ++n) {
      const uint8_t* panel = w.codes + n / kPanelRows * w.panel_bytes();
      for (int64_t k = 0; k < w.in_features; ++k) {
        const Place at = place_of(type, int(n % kPanelRows), k);
        codes[n * w.in_features + k] = uint8_t((panel[at.byte] >> at.shift) & code_mask(type));
      }
    }
  });
}

void pack_parameters(const void* values, int bytes, const PackedWeight& shape, void* packed) {
  memset(packed, 0, size_t(shape.panels() * shape.groups * kPanelRows * bytes));
  each_parameter(shape, [&](int64_t from, int64_t to) {
    memcpy(static_cast<char*>(packed) + to * bytes, static_cast<const char*>(values) + from * bytes, size_t(bytes));
  });
}

void unpack_parameters(const void* packed, int bytes, const PackedWeight& shape, void* values) {
  each_parameter(shape, [&](int64_t to, int64_t from) {
    memcpy(static_cast<char*>(values) + to * bytes, static_cast<const char*>(packed) + from * bytes, size_t(bytes));
  });
}

void dequantize(const PackedWeight& w, int64_t first, int64_t last, const int64_t* perm, DType dtype, void* target) {
  with_type(w.type, [&](auto type) {
    for (int64_t n = first * kPanelRows; n < smaller(last * kPanelRows, w.out_features); ++n) {
      const uint8_t* panel = w.codes + n / kPanelRows * w.panel_bytes();
      for (int64_t k = 0; k < w.in_features; ++k) {
        const int64_t i = (n / kPanelRows * w.groups + k / w.group) * kPanelRows + n % kPanelRows;
        const Place at = place_of(type, int(n % kPanelRows), k);
        const int code = (panel[at.byte] >> at.shift) & code_mask(type);
        int zero = 0;
        float offset = 0.f;
        if (w.offset == Offset::kSymmetric) zero = zero_point(type);
        if (w.offset == Offset::kInteger) zero = static_cast<const uint8_t*>(w.offsets)[i];
        if (w.offset == Offset::kFloat) offset = load_parameter(w.offsets, w.scale_type, i);
        const float step = w.book ? w.book->values[code] : float(code - zero);
        const float value = fmaf(step, load_parameter(w.scales, w.scale_type, i), offset);
        store_element(target, dtype, n * w.in_features + (perm ? perm[k] : k), value);
      }
    }
  });
}

}  // namespace torch_int4
