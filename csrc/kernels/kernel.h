// The contract between the framework and the kernels: plain structs, raw pointers, one table of functions per ISA.
//
// Layout "P16" of a packed weight. A panel is 16 output rows. A line is 64 bytes, 4 per row:
//   int4  one line holds 16 rows x 8 inputs: byte 4*row+j has input j in its low and input j+4 in its high nibble
//   int8  one line holds 16 rows x 4 inputs: byte 4*row+j is input j, as an unsigned code (value + 128)
//   book  laid out as int4; a code is an index into 16 values, which are int8 codes times a step (see Codebook)
//   int5  32 inputs are four lines of their low nibbles, as int4, and one of their high bits: byte 4*row+j has that of
//         input 4*i+j in bit i
//   int6  the same with two lines of two high bits: those of inputs 4*i+j and 16+4*i+j in bits 2*i and 2*i+1
// Lines of a panel are contiguous and padded with zero codes to a multiple of 32 inputs; rows are padded to 16.
// Scales and offsets have their own streams, [panel][group][16]; those of two levels are records, [panel][record].
//
// Arithmetic of compute="int8", the same in every kernel and therefore bit for bit the same on every ISA. Rows of x
// are quantized to int8 per block of inputs (a block never spans two groups); blocks are added in ascending order:
//   d   = sum of code * xq over the block                                   (exact in int32)
//   t   = d - zero * sum(xq)                                                (exact in float: below 2^24)
//   acc = fma(t, scale_w * scale_x, acc);   float offsets: acc = fma(offset, scale_x * sum(xq), acc)
// This header is included by kernels: no ATen, no STL.
#pragma once
#include <stdint.h>

#include "kernels/types.h"

namespace torch_int4 {

constexpr int kMaxBlock = 128;  // inputs that share one activation scale, at most

enum class DType : int { kF32, kBF16, kF16 };
constexpr int element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
enum class ScaleType : int { kF16, kF32, kE8M0 };  // E8M0: a power of two, 2^(byte - 127)
enum class Norm : int { kRms, kRmsOnce, kLayer };
// kRelu2 is the square of a relu. kClampedSwiglu is that of gpt-oss, always with an up: min(gate, 7) times the sigmoid
// of 1.702 times that, times up between -7 and 7, plus 1.
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSwiglu };
constexpr float kSwigluSlope = 1.702f, kSwigluLimit = 7.f;

// Zero points and offsets: zero_point(type); uint8 zeros; w = q*scale + offset; the same, where scale and offset have
// two levels (TwoLevels); zero_point(type), where the scale has two levels, for groups of kSlab inputs and for groups of
// half as many (TwoLevelScales).
enum class Offset : int { kSymmetric, kInteger, kFloat, kTwoLevel, kTwoLevelScale, kTwoLevelHalves };
constexpr bool adds_offset(Offset offset) { return offset == Offset::kFloat || offset == Offset::kTwoLevel; }
constexpr bool takes_zero_point(Offset offset) { return offset == Offset::kSymmetric || offset > Offset::kTwoLevel; }
constexpr bool has_records(Offset offset) { return offset >= Offset::kTwoLevel; }

// The pairs that loops exist for.
constexpr bool are_served(WeightType type, Offset offset) {
  if (type == WeightType::kInt6) return offset == Offset::kTwoLevelHalves;
  if (offset == Offset::kSymmetric) return true;
  if (type == WeightType::kBook) return offset == Offset::kTwoLevelScale;
  if (type == WeightType::kInt5) return adds_offset(offset);
  return offset <= Offset::kTwoLevel || (type == WeightType::kInt4 && offset == Offset::kTwoLevelHalves);
}

template <Offset O>
struct OffsetTag {
  constexpr operator Offset() const { return O; }
};

// body(tag), where the tag is a kind of offsets that the compiler knows.
template <class Body>
inline void with_offset(Offset offset, Body body) {
  switch (offset) {
    case Offset::kSymmetric:
      return body(OffsetTag<Offset::kSymmetric>{});
    case Offset::kInteger:
      return body(OffsetTag<Offset::kInteger>{});
    case Offset::kFloat:
      return body(OffsetTag<Offset::kFloat>{});
    case Offset::kTwoLevel:
      return body(OffsetTag<Offset::kTwoLevel>{});
    case Offset::kTwoLevelScale:
      return body(OffsetTag<Offset::kTwoLevelScale>{});
    default:
      return body(OffsetTag<Offset::kTwoLevelHalves>{});
  }
}

// Scales, and offsets, of 16 rows over kRecordInputs inputs, as K-quants of GGUF have them: numbers in float16, which
// the groups share, times integers of each group. The products are exact in float.
constexpr int kRecordInputs = 256;
constexpr int kHalf = kSlab / 2;
struct TwoLevels {
  static constexpr int kGroups = kRecordInputs / kSlab;
  uint16_t scale[kPanelRows], offset[kPanelRows];  // float16
  uint8_t multipliers[kGroups][2][kPanelRows];     // of scale, and of offset
};
static_assert(sizeof(TwoLevels) == 5 * kLineBytes, "records of a panel lie on whole lines");

template <int kInputs>
struct TwoLevelScales {
  static constexpr int kGroups = kRecordInputs / kInputs;
  uint16_t scale[kPanelRows];  // float16
  int8_t multipliers[kGroups][kPanelRows];
};
static_assert(sizeof(TwoLevelScales<kHalf>) == 4.5 * kLineBytes, "no padding");

// Bytes of a record; of none, 0.
constexpr int record_bytes(Offset offset) {
  return offset == Offset::kTwoLevel         ? int(sizeof(TwoLevels))
         : offset == Offset::kTwoLevelScale  ? int(sizeof(TwoLevelScales<kSlab>))
         : offset == Offset::kTwoLevelHalves ? int(sizeof(TwoLevelScales<kHalf>))
                                             : 0;
}

// 16 values, in float and as step * (code - 128), which is step * weight.
struct Codebook {
  float values[16];
  float step;
  alignas(16) uint8_t codes[16];
  alignas(16) int8_t weights[16];
};

struct PackedWeight {
  const uint8_t* codes;  // [panels][lines][64]
  const void* scales;    // [panels][groups][16] of scale_type; or records, [panels][padded_inputs / kRecordInputs]
  const void* offsets;   // [panels][groups][16], uint8 or the scales' type (a float), or null
  int64_t out_features, in_features;
  int64_t padded_inputs;  // in_features rounded up to kSlab
  int64_t group, groups;  // inputs per group (a multiple of kSlab; kHalf of kTwoLevelHalves), number of groups
  int64_t block, blocks;  // inputs per activation block, number of blocks
  ScaleType scale_type;   // kF16 where there are two levels
  WeightType type;
  Offset offset;
  const Codebook* book;  // of kBook, else null

  int64_t panels() const { return (out_features + kPanelRows - 1) / kPanelRows; }
  int64_t panel_bytes() const { return padded_inputs / kSlab * slab_bytes(type); }
  int64_t blocks_per_group() const { return (group + block - 1) / block; }
};

// Rows of x as int8, [slabs][rows][32] within +-127, with the scale of each block, the sum of its codes, and their
// product, which every panel with float offsets needs; all three [blocks][rows].
struct QuantizedRows {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  float* scaled_sums;
  int64_t rows;

  void set_block(int64_t i, float scale, int32_t sum) const {
    scales[i] = scale;
    sums[i] = sum;
    scaled_sums[i] = scale * float(sum);
  }
};

// Rows of x as float, [slabs][rows][32].
struct FloatRows {
  float* values;
  int64_t rows;
};

// y[row][0 .. out_features); each output row is the sum of `terms` consecutive input rows (2 for int8x2).
struct Output {
  void* data;
  DType dtype;
  int64_t stride;     // elements from one row to the next
  const float* bias;  // [out_features] or null
  int terms;
  const void* residual = nullptr;  // added to y after y was rounded, with the type and strides of data; or null
};

// A norm of one row, computed in float and rounded to `dtype` where models do it: kRms rounds before the product with
// the weight and after it; kRmsOnce, and kRms with an offset, after that with (offset + weight); kLayer at the end.
struct RowNorm {
  Norm kind;
  DType dtype;
  float eps, offset;
  const float* weight;  // [count]
  const float* bias;    // [count] or null
};

struct AttentionTile;  // attention_kernel.h
struct Probes;         // probe.h

// One per file in kernels/. `rank` orders them: the supported one with the highest rank is the default.
struct IsaKernels {
  const char* name;
  int rank;
  bool (*supported)();  // by the processor and the operating system; asked once
  void (*to_float)(const void* source, DType dtype, int64_t count, float* target);
  // Quantizes one row of `count` floats (a multiple of kSlab) into row `row` of `rows`; terms = 2 also writes the
  // residual, as a second int8 row with a 254 times finer scale, to row + 1.
  void (*quantize)(const float* x, int64_t count, int64_t block, const QuantizedRows& rows, int64_t row, int terms);
  // Panels [first, last) of the product. `streams` > 1: small M reads several panels, far apart, at once.
  void (*linear_int8)(const PackedWeight&, const QuantizedRows&, int64_t first, int64_t last, int streams,
                      const Output&);
  // The same on float rows; bf16 rounds the dequantized weights to bfloat16 (the rows are rounded by the caller).
  void (*linear_float)(const PackedWeight&, const FloatRows&, int64_t first, int64_t last, bool bf16, const Output&);
  // Rounds floats to `dtype`; with `clamp`, what overflows float16 becomes its largest number.
  void (*from_float)(const float* source, int64_t count, DType dtype, bool clamp, void* target);
  // Turns the first `dim` elements of x, as pairs (j, j + dim/2) or, interleaved, (2j, 2j+1), by angle j.
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved);
  // Attention of at most kFewRows rows to a span of keys, and of a tile of rows to any number of keys.
  void (*attend_few)(const AttentionTile&);
  void (*attend_many)(const AttentionTile&);
  // Normalizes `count` floats. Sums run in 16 lanes in every kernel, so that results are the same bits.
  void (*normalize)(const float* x, int64_t count, const RowNorm& norm, float* y);
  // gate = activation(gate) * up, both rounded to `dtype`, which is that of gate and up; up may be null, as ones are.
  void (*gate)(float* gate, const float* up, int64_t count, Activation activation, DType dtype);
  const Probes* probes = nullptr;  // what its instructions can do at most; null where nothing measures it
  IsaKernels* next = nullptr;
};

// Adds a kernel set to the list that dispatch.cpp searches; called by static initialisers, one per kernel file.
bool register_kernels(IsaKernels* kernels);

}  // namespace torch_int4
