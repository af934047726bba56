// The facts that kernels know of a weight's type: one row per type that loops exist for. The names by which users
// choose, several of which may share loops, are in framework/types.h.
#pragma once
#include <stdint.h>

namespace torch_int4 {

constexpr int kPanelRows = 16;  // output rows of a panel
constexpr int kLineBytes = 64;  // one cache line
constexpr int kSlab = 32;       // inputs that kernels step by; K is padded to it

enum class WeightType : int { kInt4, kInt8, kBook, kInt5, kInt6 };

struct TypeFacts {
  int bits;        // of a code, which is unsigned
  int low_bits;    // of its part in the first lines of a slab; bits above have lines of their own
  int value_bits;  // of the unsigned number that products take for it: the code itself, or a value of a code book
};

// In the order of WeightType.
constexpr TypeFacts kTypeFacts[] = {{4, 4, 4}, {8, 8, 8}, {4, 4, 8}, {5, 4, 5}, {6, 4, 6}};

constexpr int code_bits(WeightType type) { return kTypeFacts[int(type)].bits; }
constexpr int code_mask(WeightType type) { return (1 << code_bits(type)) - 1; }
constexpr int low_bits(WeightType type) { return kTypeFacts[int(type)].low_bits; }
constexpr int high_bits(WeightType type) { return code_bits(type) - low_bits(type); }
constexpr bool is_nibble(WeightType type) { return kTypeFacts[int(type)].value_bits == 4; }

// The number that stands for a weight of zero where there are no offsets.
constexpr int zero_point(WeightType type) { return 1 << (kTypeFacts[int(type)].value_bits - 1); }

// Bytes of the lines of kSlab inputs of kPanelRows rows: a line for each bit. Quads (four inputs of every row) that
// share a line of low bits, and a line of high bits.
constexpr int slab_bytes(WeightType type) { return kSlab * kPanelRows / 8 * code_bits(type); }
constexpr int low_quads(WeightType type) { return 8 / low_bits(type); }
constexpr int low_bytes(WeightType type) { return kSlab * kPanelRows / 8 * low_bits(type); }
constexpr int high_quads(WeightType type) { return 8 / high_bits(type); }

// The code of an input of a row, in the lines of its slab.
inline int code_in_slab(WeightType type, const uint8_t* slab, int row, int input) {
  const int quad = input / 4, byte = row * 4 + input % 4, low = low_bits(type), bits = high_bits(type);
  const int code = slab[quad / low_quads(type) * kLineBytes + byte] >> quad % low_quads(type) * low & ((1 << low) - 1);
  if (bits == 0) return code;
  const uint8_t* line = slab + low_bytes(type) + quad / high_quads(type) * kLineBytes;
  return code | (line[byte] >> quad % high_quads(type) * bits & ((1 << bits) - 1)) << low;
}

// The same, of a row in a panel.
inline int code_in_panel(WeightType type, const uint8_t* panel, int row, int64_t input) {
  return code_in_slab(type, panel + input / kSlab * slab_bytes(type), row, int(input % kSlab));
}

template <WeightType T>
struct TypeTag {
  constexpr operator WeightType() const { return T; }
};

// body(tag), where the tag is a type that the compiler knows: its facts are constants there.
template <class Body>
inline auto with_type(WeightType type, Body body) {
  switch (type) {
    case WeightType::kInt4:
      return body(TypeTag<WeightType::kInt4>{});
    case WeightType::kInt8:
      return body(TypeTag<WeightType::kInt8>{});
    case WeightType::kInt5:
      return body(TypeTag<WeightType::kInt5>{});
    case WeightType::kInt6:
      return body(TypeTag<WeightType::kInt6>{});
    default:
      return body(TypeTag<WeightType::kBook>{});
  }
}

}  // namespace torch_int4
