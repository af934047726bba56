// Products of weights with prepared rows: their panels, of all of them together, shared by threads.
#pragma once
#include "framework/rows.h"

namespace torch_int4 {

struct Products {
  const PackedWeight* weights;
  const Output* outputs;     // one for each weight
  const PreparedRows* rows;  // one for all weights, or one for each
  int count;
  bool own_rows;  // one for each

  const PreparedRows& rows_of(int i) const { return rows[own_rows ? i : 0]; }
};

// One fork-join covers all of them.
void run_products(const Products& products, Compute compute, ParallelFor parallel);

}  // namespace torch_int4
