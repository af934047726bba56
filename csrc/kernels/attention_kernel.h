// The contract between the framework of attention and its kernels. Included by kernels: no ATen, no STL.
//
// Arithmetic: score = softcap(query . key * scale) + mask + slope * key index in float; the softmax is kept as
// (largest score, sum of exponentials, weighted sum of values), so that spans of keys can be merged. A key that a row
// may not see adds nothing to it, whatever its bytes are.
#pragma once
#include "kernels/kernel.h"

namespace torch_int4 {

constexpr int kLanes = 16;
constexpr int kFewRows = 16;     // rows that attend_few takes, at most
constexpr int kManyRows = 128;   // rows of one call of attend_many, at most
constexpr int kSpan = 512;       // keys of one call of attend_few, at most
constexpr int kManySpan = 2048;  // keys of one call of attend_many where rows are too few to keep threads busy
constexpr int kKeyTile = 64;     // keys that attend_many converts at a time

enum class CacheType : int { kF32, kBF16, kF16, kInt8 };
enum class MaskType : int { kNone, kBool, kF32, kBF16, kF16 };

constexpr int64_t padded_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// One query row: it may see keys [first, last), less those that its row of the mask forbids.
struct AttentionRow {
  int64_t first, last;
  const void* mask;  // of key 0; null where there is no mask
  float slope;       // alibi: added per key index
};

// Rows that share the keys and values of one head.
struct AttentionTile {
  CacheType type;
  MaskType mask_type;
  const void* keys;                        // of key 0, [key][dim]
  const void* values;                      // [key][value_dim]
  int64_t key_stride, value_stride;        // elements
  const float *key_scales, *value_scales;  // [key] of int8, else null
  int64_t dim, value_dim;
  int64_t begin, end;  // the keys of this call; begin is a multiple of kKeyTile
  int rows;
  const AttentionRow* row;
  const float* query;  // [rows][padded_lanes(dim)], times the scale, zeros behind
  float softcap;       // 0: none
  float* scratch;      // attention_scratch() floats, aligned to 64 bytes
  // Results, per row: the largest score (-inf: no key seen), the sum of exponentials, and the weighted values.
  float* largest;
  float* total;
  float* sums;  // [rows][padded_lanes(value_dim)]
};

// Floats of scratch that a call needs.
constexpr int64_t few_scratch() { return 2 * kFewRows * kSpan; }
constexpr int64_t many_scratch(int64_t dim, int64_t value_dim) {
  return (kManyRows + kKeyTile) * (padded_lanes(dim) + padded_lanes(value_dim)) + 2 * kKeyTile * 4 * kLanes +
         5 * kManyRows;
}

}  // namespace torch_int4
