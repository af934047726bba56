#include "framework/experts.h"

#include <algorithm>
#include <vector>

#include "framework/dispatch.h"
#include "framework/products.h"

namespace torch_int4 {
namespace {

constexpr int64_t kPassBytes = int64_t(128) << 20;  // of what the rows of a pass give; each pass reads weights again

// The pairs of a row and an expert, those of the same expert next to each other. Pair i is row rows[i] of x.
struct Pairs {
  std::vector<int64_t> rows, places;  // places[row * top_k + choice]: which pair that is, or -1
  std::vector<int64_t> experts;       // that were chosen, ascending
  std::vector<int64_t> begins;        // of the pairs of each of them, and the end of the last

  void find(const Experts& e) {
    const int64_t choices = e.x.rows * e.top_k;
    std::vector<int64_t> counts(size_t(e.count + 1));
    for (int64_t i = 0; i < choices; ++i) ++counts[size_t(e.chosen[i])];
    experts.clear(), begins.assign(1, 0);
    std::vector<int64_t> next(size_t(e.count));
    for (int64_t i = 0; i < e.count; ++i) {
      next[size_t(i)] = begins.back();
      if (!counts[size_t(i)]) continue;
      experts.push_back(i);
      begins.push_back(begins.back() + counts[size_t(i)]);
    }
    rows.resize(size_t(begins.back())), places.resize(size_t(choices));
    for (int64_t i = 0; i < choices; ++i) {
      const int64_t expert = e.chosen[i];
      places[size_t(i)] = expert == e.count ? -1 : next[size_t(expert)]++;
      if (places[size_t(i)] >= 0) rows[size_t(places[size_t(i)])] = i / e.top_k;
    }
  }

  int64_t count() const { return begins.back(); }
  int64_t begin(size_t i) const { return begins[i]; }
  int64_t rows_of(size_t i) const { return begins[i + 1] - begins[i]; }
};

// What the pairs of a pass are given and give.
struct Pass {
  const Experts& e;
  Compute compute;
  Pairs pairs;
  char* inner[2];        // [pairs][features] of gate and up, or of up, of the type of x
  float* outputs;        // [pairs][out_features]
  const RowsMemory* to;  // where rows are prepared

  int linears() const { return e.gated ? 2 : 1; }  // that get x
  const Expert& expert(size_t i) const { return e.experts[pairs.experts[i]]; }
};

// The expert of pair i: its number among the chosen.
size_t expert_of(const Pairs& pairs, int64_t pair) {
  return size_t(std::upper_bound(pairs.begins.begin(), pairs.begins.end(), pair) - pairs.begins.begin()) - 1;
}

// Row `source(pair)` of x for each of the pairs [begin, end); perm is the member of Expert that x goes through.
template <class Source>
void prepare_pairs(const Pass& p, const Input& x, int linear, const int64_t* Expert::* perm, int64_t begin, int64_t end,
                   Source source) {
  for (size_t i = expert_of(p.pairs, begin); begin < end; ++i) {
    const Expert& expert = p.expert(i);
    const int64_t first = p.pairs.begin(i), last = std::min(end, p.pairs.begins[i + 1]);
    Input own = x;
    own.perm = expert.*perm;
    const PreparedRows target = p.to->part(first, p.pairs.rows_of(i));
    for (; begin < last; ++begin) {
      prepare_row(own, source(begin), expert.weights[linear], p.compute, target, begin - first);
    }
  }
}

void prepare_inputs(void* context, int64_t begin, int64_t end) {
  const Pass& p = *static_cast<const Pass*>(context);
  prepare_pairs(p, p.e.x, 0, &Expert::perm, begin, end, [&](int64_t pair) { return p.pairs.rows[size_t(pair)]; });
}

// What the experts' activations give.
Input inner_input(const Pass& p) {
  Input x{p.inner[p.linears() - 1], p.e.x.dtype, p.pairs.count(), nullptr};
  x.gate = p.e.gated ? p.inner[0] : nullptr;
  x.activation = &p.e.activation;
  return x;
}

void prepare_inner(void* context, int64_t begin, int64_t end) {
  const Pass& p = *static_cast<const Pass*>(context);
  prepare_pairs(p, inner_input(p), p.linears(), &Expert::down_perm, begin, end, [](int64_t pair) { return pair; });
}

// Products of the linears [first, last) of all chosen experts; `data[i]` is where those of linear first + i go.
void multiply(const Pass& p, int first, int last, char* const* data, DType dtype, const PreparedRows* shared,
              ParallelFor parallel) {
  std::vector<PackedWeight> weights;
  std::vector<Output> outputs;
  std::vector<PreparedRows> rows;
  for (size_t i = 0; i < p.pairs.experts.size(); ++i) {
    const Expert& expert = p.expert(i);
    for (int linear = first; linear < last; ++linear) {
      const PackedWeight& w = expert.weights[linear];
      char* const target = data[linear - first] + p.pairs.begin(i) * w.out_features * element_bytes(dtype);
      weights.push_back(w);
      outputs.push_back({target, dtype, w.out_features, expert.biases[linear], 1});
      rows.push_back(shared ? *shared : p.to->part(p.pairs.begin(i), p.pairs.rows_of(i)));
    }
  }
  run_products({weights.data(), outputs.data(), rows.data(), int(weights.size()), true}, p.compute, parallel);
}

bool permutes(const Pass& p) {
  for (size_t i = 0; i < p.pairs.experts.size(); ++i) {
    if (p.expert(i).perm) return true;
  }
  return false;
}

void inner_products(Pass& p, RowsMemory& memory, ParallelFor parallel) {
  const PackedWeight& w = p.expert(0).weights[0];
  if (p.e.x.rows == 1 && !permutes(p)) {  // one row, which all its experts get
    memory.reserve(w, p.compute, 1);
    const PreparedRows row = memory.part(0, 1);
    prepare_row(p.e.x, 0, w, p.compute, row, 0);
    multiply(p, 0, p.linears(), p.inner, p.e.x.dtype, &row, parallel);
    return;
  }
  memory.reserve(w, p.compute, p.pairs.count());
  over_rows(p.pairs.count(), row_cost(p.e.x, w), parallel, prepare_inputs, &p);
  multiply(p, 0, p.linears(), p.inner, p.e.x.dtype, nullptr, parallel);
}

void down_products(Pass& p, RowsMemory& memory, ParallelFor parallel) {
  const PackedWeight& w = p.expert(0).weights[p.linears()];
  memory.reserve(w, p.compute, p.pairs.count());
  over_rows(p.pairs.count(), row_cost(inner_input(p), w), parallel, prepare_inner, &p);
  char* const data[] = {reinterpret_cast<char*>(p.outputs)};
  multiply(p, p.linears(), p.linears() + 1, data, DType::kF32, nullptr, parallel);
}

// Sums of the experts' rows, times their shares.
void add_rows(void* context, int64_t begin, int64_t end) {
  thread_local Buffer buffer;
  const Pass& p = *static_cast<const Pass*>(context);
  const Experts& e = p.e;
  const int64_t features = e.experts[0].weights[p.linears()].out_features;
  float* sum = buffer.get<float>(features);
  for (int64_t row = begin; row < end; ++row) {
    std::fill(sum, sum + features, 0.f);
    for (int64_t i = row * e.top_k; i < (row + 1) * e.top_k; ++i) {
      if (p.pairs.places[size_t(i)] < 0) continue;
      const float share = e.shares[i], *values = p.outputs + p.pairs.places[size_t(i)] * features;
      for (int64_t j = 0; j < features; ++j) sum[j] += share * values[j];
    }
    char* const target = static_cast<char*>(e.output) + row * features * element_bytes(e.x.dtype);
    active_kernels().from_float(sum, features, e.x.dtype, false, target);
  }
}

void run_pass(const Experts& e, Compute compute, ParallelFor parallel) {
  thread_local RowsMemory memory;
  thread_local Buffer buffer;
  Pass p{e, compute, {}, {}, nullptr, &memory};
  p.pairs.find(e);
  const int last = p.linears();
  const int64_t features = e.experts[0].weights[last].out_features;
  if (p.pairs.count()) {
    const int64_t inner = p.pairs.count() * e.experts[0].weights[0].out_features * element_bytes(e.x.dtype);
    const int64_t line = (inner + 63) / 64 * 64;
    p.inner[0] = buffer.get<char>(last * line + p.pairs.count() * features * int64_t(sizeof(float)));
    p.inner[1] = p.inner[0] + line;
    p.outputs = reinterpret_cast<float*>(p.inner[0] + last * line);
    inner_products(p, memory, parallel);
    down_products(p, memory, parallel);
  }
  over_rows(e.x.rows, features * e.top_k, parallel, add_rows, &p);
  buffer.trim(kKeptBytes);
  memory.trim();
}

}  // namespace

void run_experts(const Experts& e, Compute compute, ParallelFor parallel) {
  const PackedWeight &first = e.experts[0].weights[0], &down = e.experts[0].weights[e.gated ? 2 : 1];
  const int64_t bytes = element_bytes(e.x.dtype);
  const int64_t row_bytes = e.top_k * (first.out_features * bytes * (e.gated ? 2 : 1) + down.out_features * 4);
  const int64_t rows = std::max<int64_t>(1, kPassBytes / row_bytes);
  for (int64_t row = 0; row < e.x.rows; row += rows) {
    Experts part = e;
    part.x.rows = std::min(rows, e.x.rows - row);
    part.x.data = static_cast<const char*>(e.x.data) + row * first.in_features * bytes;
    part.chosen += row * e.top_k;
    part.shares += row * e.top_k;
    part.output = static_cast<char*>(e.output) + row * down.out_features * bytes;
    run_pass(part, compute, parallel);
  }
}

}  // namespace torch_int4
