// Between the canonical form of a weight ([out_features][in_features] codes) and the packed panels of kernel.h.
#pragma once
#include "kernels/kernel.h"

namespace torch_int4 {

// Panels [first, last). Rows and inputs beyond the weight become zero codes.
void pack_codes(const uint8_t* codes, const PackedWeight& shape, int64_t first, int64_t last, uint8_t* packed);
void unpack_codes(const PackedWeight& w, int64_t first, int64_t last, uint8_t* codes);

// The parameters of panels [first, last), one per row and group, of 1, 2 or 4 bytes: [out_features][groups] <->
// [panels][groups][16]. Those of rows beyond the weight become zero.
void pack_parameters(const void* values, int bytes, const PackedWeight& shape, int64_t first, int64_t last,
                     void* packed);
void unpack_parameters(const void* packed, int bytes, const PackedWeight& shape, int64_t first, int64_t last,
                       void* values);

// Scales, and offsets, of two levels: float16 [out_features][records], and multipliers, uint8 [out_features][groups][2]
// of scales and offsets (kTwoLevel), or int8 [out_features][groups] of scales alone.
struct TwoLevelParameters {
  uint16_t *scales, *offsets;  // the latter null where there are none
  void* multipliers;
};

// Between them and the records of kernel.h, [panels][records]. Those of rows beyond the weight become zero.
void pack_records(const TwoLevelParameters& given, const PackedWeight& shape, int64_t first, int64_t last,
                  void* packed);
void unpack_records(const PackedWeight& w, int64_t first, int64_t last, const TwoLevelParameters& target);

// Output rows [first * 16, last * 16) as floats, w = fma(code - zero, scale, offset); perm scatters the inputs back.
void dequantize(const PackedWeight& w, int64_t first, int64_t last, const int64_t* perm, DType dtype, void* target);

}  // namespace torch_int4
