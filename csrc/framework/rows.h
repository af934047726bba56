// Rows of an input in the form that kernels take: loaded, normalized or gated, permuted, and quantized or as floats.
#pragma once
#include "framework/buffer.h"
#include "framework/linear.h"

namespace torch_int4 {

constexpr int64_t kParallelElements = 1 << 13;  // preparing fewer elements than this is not worth a fork-join
constexpr int64_t kNormCost = 4;                // elements prepared in the time that one is normalized, or gated

inline bool is_integer(Compute compute) { return compute == Compute::kInt8 || compute == Compute::kInt8x2; }
inline int terms_of(Compute compute) { return compute == Compute::kInt8x2 ? 2 : 1; }

// One of the two, by the arithmetic.
struct PreparedRows {
  QuantizedRows quantized;
  FloatRows floats;
};

// Memory for prepared rows, kept between calls by the thread that has it.
class RowsMemory {
 public:
  void reserve(const PackedWeight& w, Compute compute, int64_t rows) {
    const int64_t count = rows * terms_of(compute), blocks = count * w.blocks;
    all_ = {};
    inputs_ = w.padded_inputs, blocks_ = w.blocks, terms_ = terms_of(compute);
    if (is_integer(compute)) {
      all_.quantized = {values_.get<int8_t>(count * inputs_), scales_.get<float>(blocks), sums_.get<int32_t>(blocks),
                        scaled_sums_.get<float>(blocks), count};
    } else {
      all_.floats = {values_.get<float>(count * inputs_), count};
    }
  }

  // Rows from `first` on as rows by themselves, which kernels read without the others.
  PreparedRows part(int64_t first, int64_t rows) const {
    const int64_t skipped = first * terms_, blocks = skipped * blocks_;
    const QuantizedRows& q = all_.quantized;
    if (!q.codes) return {{}, {all_.floats.values + skipped * inputs_, rows * terms_}};
    return {{q.codes + skipped * inputs_, q.scales + blocks, q.sums + blocks, q.scaled_sums + blocks, rows * terms_},
            {}};
  }

  void trim() {
    values_.trim(kKeptBytes);
    all_ = {};
  }

 private:
  Buffer values_, scales_, sums_, scaled_sums_;
  PreparedRows all_{};
  int64_t inputs_ = 0, blocks_ = 0, terms_ = 1;
};

// Writes row `row` of x, an input of w, to row `target_row` of `target`.
void prepare_row(const Input& x, int64_t row, const PackedWeight& w, Compute compute, const PreparedRows& target,
                 int64_t target_row);

// Elements of a plain row that are prepared in the time of one row of x.
inline int64_t row_cost(const Input& x, const PackedWeight& w) {
  return w.padded_inputs * (x.norm || x.activation ? kNormCost : 1);
}

// Runs body over rows of such a cost, on threads where that is worth it.
inline void over_rows(int64_t rows, int64_t cost, ParallelFor parallel, ParallelBody body, void* context) {
  if (rows > 1 && rows * cost >= kParallelElements) parallel(rows, 1 + kParallelElements / 2 / cost, body, context);
  else body(context, 0, rows);
}

}  // namespace torch_int4
