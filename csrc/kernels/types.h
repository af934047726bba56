// The facts that kernels know of a weight's type: one row per type that loops exist for. The names by which users
// choose, several of which may share loops, are in framework/types.h.
#pragma once
#include <stdint.h>

namespace torch_int4 {

constexpr int kPanelRows = 16;  // output rows of a panel
constexpr int kLineBytes = 64;  // one cache line
constexpr int kSlab = 32;       // inputs that kernels step by; K is padded to it

enum class WeightType : int { kInt4, kInt8, kBook };

struct TypeFacts {
  int bits;        // of a code, which is unsigned
  int value_bits;  // of the unsigned number that products take for it: the code itself, or a value of a code book
};

// In the order of WeightType.
constexpr TypeFacts kTypeFacts[] = {{4, 4}, {8, 8}, {4, 8}};

constexpr int code_bits(WeightType type) { return kTypeFacts[int(type)].bits; }
constexpr int code_mask(WeightType type) { return (1 << code_bits(type)) - 1; }
constexpr bool is_wide(WeightType type) { return kTypeFacts[int(type)].value_bits == 8; }

// The number that stands for a weight of zero where there are no offsets.
constexpr int zero_point(WeightType type) { return 1 << (kTypeFacts[int(type)].value_bits - 1); }

// Inputs of a line, which holds them of kPanelRows rows; bytes of the lines of kSlab inputs.
constexpr int line_inputs(WeightType type) { return kLineBytes / kPanelRows * 8 / code_bits(type); }
constexpr int slab_bytes(WeightType type) { return kSlab / line_inputs(type) * kLineBytes; }

// The place of the code of one input of a row in a panel: its byte, and the shift inside it.
struct Place {
  int64_t byte;
  int shift;
};

constexpr Place place_of(WeightType type, int row, int64_t input) {
  const int64_t inside = input % line_inputs(type);
  return {input / line_inputs(type) * kLineBytes + row * 4 + inside % 4, int(inside / 4) * code_bits(type)};
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
    default:
      return body(TypeTag<WeightType::kBook>{});
  }
}

}  // namespace torch_int4
