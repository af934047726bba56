#include "framework/pack.h"

#include <math.h>
#include <string.h>

#include <type_traits>

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
  const int64_t records = shape.padded_inputs / kRecordInputs;
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t i = 0; i < records; ++i) {
      for (int row = 0; row < kPanelRows; ++row) {
        const int64_t n = panel * kPanelRows + row;
        move(n < shape.out_features ? n * records + i : -1, panel * records + i, row);
      }
    }
  }
}

// body(a record of what a kind of offsets has).
template <class Body>
void with_record(Offset offset, Body body) {
  if (offset == Offset::kTwoLevel) body(TwoLevels{});
  if (offset == Offset::kTwoLevelScale) body(TwoLevelScales<kSlab>{});
  if (offset == Offset::kTwoLevelHalves) body(TwoLevelScales<kHalf>{});
}

// move(number inside a record, its array outside, its place there) of all numbers of a row in record `plain` of a weight.
template <class Move>
void each_parameter_of(TwoLevels& record, int row, int64_t plain, const TwoLevelParameters& given, Move move) {
  move(record.scale[row], given.scales, plain);
  move(record.offset[row], given.offsets, plain);
  for (int i = 0; i < 2 * TwoLevels::kGroups; ++i) {
    move(record.multipliers[i / 2][i % 2][row], static_cast<uint8_t*>(given.multipliers),
         plain * 2 * TwoLevels::kGroups + i);
  }
}

template <int kInputs, class Move>
void each_parameter_of(TwoLevelScales<kInputs>& record, int row, int64_t plain, const TwoLevelParameters& given,
                       Move move) {
  constexpr int kGroups = TwoLevelScales<kInputs>::kGroups;
  move(record.scale[row], given.scales, plain);
  for (int i = 0; i < kGroups; ++i) {
    move(record.multipliers[i][row], static_cast<int8_t*>(given.multipliers), plain * kGroups + i);
  }
}

// body(a value of as many bytes), for elements whose type does not matter.
template <class Body>
void with_width(int bytes, Body body) {
  if (bytes == 1) return body(uint8_t(0));
  if (bytes == 2) return body(uint16_t(0));
  body(uint32_t(0));
}

// A word of each line is a row's: the `bits` above `skipped` ones of every four codes, four bytes at once, shifted by
// those before them. `packed` is the row's first word.
template <int kBits>
void pack_lines(const uint8_t* codes, int skipped, uint8_t* packed) {
  for (int i = 0; i < kSlab; i += 32 / kBits, packed += kLineBytes) {
    uint32_t word = 0;
    for (int quad = 0; quad < 8 / kBits; ++quad) {
      uint32_t four;
      memcpy(&four, codes + i + 4 * quad, sizeof four);
      word |= (four >> skipped & ((1 << kBits) - 1) * 0x01010101u) << (quad * kBits);
    }
    memcpy(packed, &word, sizeof word);
  }
}

template <int kBits>
void unpack_lines(const uint8_t* packed, int skipped, uint8_t* codes) {
  for (int i = 0; i < kSlab; i += 32 / kBits, packed += kLineBytes) {
    uint32_t word;
    memcpy(&word, packed, sizeof word);
    for (int quad = 0; quad < 8 / kBits; ++quad) {
      uint32_t four;
      memcpy(&four, codes + i + 4 * quad, sizeof four);
      four |= (word >> (quad * kBits) & ((1 << kBits) - 1) * 0x01010101u) << skipped;
      memcpy(codes + i + 4 * quad, &four, sizeof four);
    }
  }
}

// The codes of a row in a slab, where its words begin at `packed`.
template <class Type>
void pack_row(Type type, const uint8_t* codes, uint8_t* packed) {
  pack_lines<low_bits(type)>(codes, 0, packed);
  if constexpr (high_bits(type) > 0) pack_lines<high_bits(type)>(codes, low_bits(type), packed + low_bytes(type));
}

template <class Type>
void unpack_row(Type type, const uint8_t* packed, uint8_t* codes) {
  memset(codes, 0, kSlab);
  unpack_lines<low_bits(type)>(packed, 0, codes);
  if constexpr (high_bits(type) > 0) unpack_lines<high_bits(type)>(packed + low_bytes(type), low_bits(type), codes);
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
      pack_row(type, from, packed + byte);
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
      unpack_row(type, w.codes + byte, to);
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

void pack_records(const TwoLevelParameters& given, const PackedWeight& shape, int64_t first, int64_t last,
                  void* packed) {
  with_record(shape.offset, [&](auto zero) {
    using Record = decltype(zero);
    each_record(shape, first, last, [&](int64_t plain, int64_t place, int row) {
      Record& record = static_cast<Record*>(packed)[place];
      each_parameter_of(record, row, plain, given, [&](auto& inside, auto* outside, int64_t i) {
        inside = plain < 0 ? std::remove_reference_t<decltype(inside)>(0) : outside[i];
      });
    });
  });
}

void unpack_records(const PackedWeight& w, int64_t first, int64_t last, const TwoLevelParameters& target) {
  with_record(w.offset, [&](auto zero) {
    using Record = decltype(zero);
    each_record(w, first, last, [&](int64_t plain, int64_t place, int row) {
      if (plain < 0) return;
      Record record = static_cast<const Record*>(w.scales)[place];
      each_parameter_of(record, row, plain, target,
                        [](auto& inside, auto* outside, int64_t i) { outside[i] = inside; });
    });
  });
}

void dequantize(const PackedWeight& w, int64_t first, int64_t last, const int64_t* perm, DType dtype, void* target) {
  with_type(w.type, [&](auto type) {
    for (int64_t n = first * kPanelRows; n < smaller(last * kPanelRows, w.out_features); ++n) {
      const uint8_t* panel = w.codes + n / kPanelRows * w.panel_bytes();
      for (int64_t k = 0; k < w.in_features; ++k) {
        const int64_t i = (n / kPanelRows * w.groups + k / w.group) * kPanelRows + n % kPanelRows;
        const int code = code_in_panel(type, panel, int(n % kPanelRows), k);
        const GroupParameters p = group_parameters(w, i);
        const float value = fmaf(w.book ? w.book->values[code] : float(code - p.zero), p.scale, p.offset);
        store_element(target, dtype, n * w.in_features + (perm ? perm[k] : k), value);
      }
    }
  });
}

}  // namespace torch_int4
