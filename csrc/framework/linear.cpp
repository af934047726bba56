#include "framework/linear.h"

#include <algorithm>
#include <vector>

#include "framework/dispatch.h"
#include "framework/products.h"

namespace torch_int4 {
namespace {

constexpr int64_t kPassRows = 128;      // kernels read weights once for so many rows, or more often
constexpr int kForms = kMaxBlock / 16;  // in which weights may take one input: blocks of 16 inputs, 32, 48, ...

struct Rows {
  const Input& x;
  const PackedWeight& w;
  Compute compute;
  PreparedRows prepared;
};

void prepare_rows(void* context, int64_t begin, int64_t end) {
  const Rows& rows = *static_cast<const Rows*>(context);
  for (int64_t row = begin; row < end; ++row) prepare_row(rows.x, row, rows.w, rows.compute, rows.prepared, row);
}

}  // namespace

const char* linear(const PackedWeight* w, const Output* y, int count, const Input& x, Compute compute,
                   ParallelFor parallel) {
  thread_local RowsMemory memory[kForms];
  PreparedRows forms[kForms];
  std::vector<PreparedRows> rows;  // of each weight, where not all take the same
  int64_t blocks[kForms];          // lengths of the blocks of each form; floats have no blocks
  int made = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t block = is_integer(compute) ? w[i].block : 0;
    const int form = int(std::find(blocks, blocks + made, block) - blocks);
    if (form == made) {
      blocks[made] = block;
      memory[made].reserve(w[i], compute, x.rows);
      forms[made] = memory[made].part(0, x.rows);
      Rows job{x, w[i], compute, forms[made++]};
      over_rows(x.rows, row_cost(x, w[i]), parallel, prepare_rows, &job);
    }
    if (made > 1 && rows.empty()) rows.assign(size_t(i), forms[0]);
    if (made > 1) rows.push_back(forms[form]);
  }
  run_products({w, y, rows.empty() ? forms : rows.data(), count, !rows.empty()}, compute, parallel);
  for (int i = 0; i < made; ++i) memory[i].trim();
  return active_kernels().name;
}

namespace {

// All rows of m at once.
void mlp_pass(const Mlp& m, Compute compute, ParallelFor parallel) {
  thread_local Buffer buffer;  // gate and up, in the type of x
  const int64_t inner = m.weights[0].out_features, rows = m.x.rows;
  const int64_t bytes = rows * inner * element_bytes(m.x.dtype);
  const int count = m.gated ? 2 : 1;
  char* first = buffer.get<char>(count * bytes);
  const Output inside[] = {{first, m.x.dtype, inner, m.biases[0], 1},
                           {first + bytes, m.x.dtype, inner, m.biases[1], 1}};
  linear(m.weights, inside, count, m.x, compute, parallel);
  Input product{m.gated ? first + bytes : first, m.x.dtype, rows, m.down_perm};
  product.gate = m.gated ? first : nullptr;
  product.activation = &m.activation;
  Output output = m.output;
  output.bias = m.biases[count];
  linear(m.weights + count, &output, 1, product, compute, parallel);
  buffer.trim(kKeptBytes);
}

}  // namespace

void mlp(const Mlp& m, Compute compute, ParallelFor parallel) {
  const int64_t bytes = element_bytes(m.x.dtype), inner_bytes = m.weights[0].out_features * bytes;
  const int64_t fit = int64_t(kKeptBytes) / ((m.gated ? 2 : 1) * inner_bytes) / kPassRows * kPassRows;
  const int64_t pass = fit > kPassRows ? fit : kPassRows;
  for (int64_t row = 0; row < m.x.rows; row += pass) {
    Mlp part = m;
    part.x.rows = m.x.rows - row < pass ? m.x.rows - row : pass;
    part.x.data = static_cast<const char*>(m.x.data) + row * m.weights[0].in_features * bytes;
    const int64_t skipped = row * m.output.stride * bytes;
    part.output.data = static_cast<char*>(m.output.data) + skipped;
    if (m.output.residual) part.output.residual = static_cast<const char*>(m.output.residual) + skipped;
    mlp_pass(part, compute, parallel);
  }
}

}  // namespace torch_int4
