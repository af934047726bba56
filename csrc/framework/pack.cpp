#include "framework/pack.h"

#include <math.h>
#include <string.h>

#include "kernels/scalar.h"

namespace torch_int4 {
namespace {

// move(index in [out_features][groups], index in [panels][groups][16]) of the parameters of panels [first, last); the
// first is -1 in rows beyond the weight.
template <class Move>
void each_parameter(const PackedWeight& shape, int64_t first, int64_t last, Move move) {
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      for (int row = 0; row < kPanelRows; ++row) {
        const int64_t n = panel * kPanelRows + row;
        move(n < shape.out_features ? n * shape.groups + g : -1, (panel * shape.groups + g) * kPanelRows + row);
      }
    }
  }
}

// move(index in [out_features][records], index in [panels][records], row) of the records of panels [first, last); the
// first index is -1 in rows beyond the weight.
template <class Move>
void each_record(const PackedWeight& shape, int64_t first, int64_t last, Move move) {
  const int64_t records = shape.groups / kRecordGroups;
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t i = 0; i < records; ++i) {
      for (int row = 0; row < kPanelRows; ++row) {
        const int64_t n = panel * kPanelRows + row;
        move(n < shape.out_features ? n * records + i : -1, panel * records + i, row);
      }
    }
  }
}

// body(a value of as many bytes), for elements whose type does not matter.
template <class Body>
void with_width(int bytes, Body body) {
  if (bytes == 1) return body(uint8_t(0));
  if (bytes == 2) return body(uint16_t(0));
  body(uint32_t(0));
}

// The codes of one row in a line: every four inputs are one word (place_of), shifted by what lies before them.
template <class Type>
uint32_t pack_word(Type type, const uint8_t* codes) {
  uint32_t word = 0;
  for (int i = 0; i < line_inputs(type); i += 4) {
    uint32_t four;
    memcpy(&four, codes + i, sizeof four);
    word |= four << (i / 4 * code_bits(type));
  }
  return word;
}

template <class Type>
void unpack_word(Type type, uint32_t word, uint8_t* codes) {
  for (int i = 0; i < line_inputs(type); i += 4) {
    const uint32_t four = word >> (i / 4 * code_bits(type)) & (code_mask(type) * 0x01010101u);
    memcpy(codes + i, &four, sizeof four);
  }
}

// move(row, its codes, the first byte of its words) of every row and slab of panels [first, last). Slabs come before
// rows: rows of a power of two bytes lie on one set of the first cache, which holds fewer of them than a panel has.
template <class Type, class Move>
void each_slab(Type type, const PackedWeight& shape, int64_t first, int64_t last, Move move) {
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t base = panel * shape.panel_bytes();
    for (int64_t slab = 0; slab * slab_bytes(type) < shape.panel_bytes(); ++slab) {
      for (int row = 0; row < kPanelRows; ++row) {
        move(panel * kPanelRows + row, slab * kSlab, base + slab * slab_bytes(type) + row * int64_t(sizeof(uint32_t)));
      }
    }
  }
}

}  // namespace

void pack_codes(const uint8_t* codes, const PackedWeight& shape, int64_t first, int64_t last, uint8_t* packed) {
  with_type(shape.type, [&](auto type) {
    each_slab(type, shape, first, last, [&](int64_t n, int64_t k, int64_t byte) {
      uint8_t copied[kSlab] = {};
      const uint8_t* from = copied;
      const int64_t there = n < shape.out_features ? smaller(kSlab, shape.in_features - k) : 0;
      if (there == kSlab) {
        from = codes + n * shape.in_features + k;
      } else if (there > 0) {
        memcpy(copied, codes + n * shape.in_features + k, size_t(there));
      }
      for (int i = 0; i < kSlab; i += line_inputs(type), byte += kLineBytes) {
        const uint32_t word = pack_word(type, from + i);
        memcpy(packed + byte, &word, sizeof word);
      }
    });
  });
}

void unpack_codes(const PackedWeight& w, int64_t first, int64_t last, uint8_t* codes) {
  with_type(w.type, [&](auto type) {
    each_slab(type, w, first, last, [&](int64_t n, int64_t k, int64_t byte) {
      const int64_t there = n < w.out_features ? smaller(kSlab, w.in_features - k) : 0;
      if (there <= 0) return;
      uint8_t copied[kSlab];
      uint8_t* to = there == kSlab ? codes + n * w.in_features + k : copied;
      for (int i = 0; i < kSlab; i += line_inputs(type), byte += kLineBytes) {
        uint32_t word;
        memcpy(&word, w.codes + byte, sizeof word);
        unpack_word(type, word, to + i);
      }
      if (to == copied) memcpy(codes + n * w.in_features + k, copied, size_t(there));
    });
  });
}

void pack_parameters(const void* values, int bytes, const PackedWeight& shape, int64_t first, int64_t last,
                     void* packed) {
  with_width(bytes, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(values);
    auto* to = static_cast<decltype(zero)*>(packed);
    each_parameter(shape, first, last,
                   [&](int64_t plain, int64_t place) { to[place] = plain < 0 ? zero : from[plain]; });
  });
}

void unpack_parameters(const void* packed, int bytes, const PackedWeight& shape, int64_t first, int64_t last,
                       void* values) {
  with_width(bytes, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(packed);
    auto* to = static_cast<decltype(zero)*>(values);
    each_parameter(shape, first, last, [&](int64_t plain, int64_t place) {
      if (plain >= 0) to[plain] = from[place];
    });
  });
}

void pack_two_levels(const uint16_t* scales, const uint16_t* offsets, const uint8_t* multipliers,
                     const PackedWeight& shape, int64_t first, int64_t last, TwoLevels* packed) {
  each_record(shape, first, last, [&](int64_t plain, int64_t place, int row) {
    TwoLevels& record = packed[place];
    record.scale[row] = plain < 0 ? uint16_t(0) : scales[plain];
    record.offset[row] = plain < 0 ? uint16_t(0) : offsets[plain];
    for (int i = 0; i < 2 * kRecordGroups; ++i) {
      record.multipliers[i / 2][i % 2][row] = plain < 0 ? uint8_t(0) : multipliers[plain * 2 * kRecordGroups + i];
    }
  });
}

void unpack_two_levels(const PackedWeight& w, int64_t first, int64_t last, uint16_t* scales, uint16_t* offsets,
                       uint8_t* multipliers) {
  const auto* packed = static_cast<const TwoLevels*>(w.scales);
  each_record(w, first, last, [&](int64_t plain, int64_t place, int row) {
    if (plain < 0) return;
    const TwoLevels& record = packed[place];
    scales[plain] = record.scale[row];
    offsets[plain] = record.offset[row];
    for (int i = 0; i < 2 * kRecordGroups; ++i) {
      multipliers[plain * 2 * kRecordGroups + i] = record.multipliers[i / 2][i % 2][row];
    }
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
        const GroupParameters p = group_parameters(w, i);
        const float value = fmaf(w.book ? w.book->values[code] : float(code - p.zero), p.scale, p.offset);
        store_element(target, dtype, n * w.in_features + (perm ? perm[k] : k), value);
      }
    }
  });
}

}  // namespace torch_int4
