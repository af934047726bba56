#include "framework/products.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>

#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

constexpr int64_t kThreadBytes = 1 << 15;  // weight bytes times rows that are worth a thread
constexpr int64_t kPieceBytes = 1 << 16;   // weight bytes times rows of the smallest piece that threads pick up

// Several read streams per thread keep more reads under way than one; TORCH_INT4_STREAMS=1 turns that off.
int streams() {
  static const int value = [] {
    const char* text = getenv("TORCH_INT4_STREAMS");
    return text ? atoi(text) : 2;
  }();
  return value;
}

struct Job {
  const IsaKernels& kernels;
  const Products& products;
  Compute compute;
  int64_t panels = 0, given = 0, piece = 0;  // of all weights; given out beforehand; worth picking up
  std::atomic<int64_t> next{0};              // the first panel that nobody has picked up
};

// Panels [begin, end) of all the weights in a row.
void run_range(const Job& job, int64_t begin, int64_t end) {
  for (int i = 0; i < job.products.count && end > 0; ++i) {
    const PackedWeight& w = job.products.weights[i];
    const int64_t panels = w.panels(), first = begin > 0 ? begin : 0, last = end < panels ? end : panels;
    begin -= panels;
    end -= panels;
    if (first >= last) continue;
    Output out = job.products.outputs[i];
    out.terms = terms_of(job.compute);
    const PreparedRows& rows = job.products.rows_of(i);
    if (is_integer(job.compute)) job.kernels.linear_int8(w, rows.quantized, first, last, streams(), out);
    else job.kernels.linear_float(w, rows.floats, first, last, job.compute == Compute::kBf16, out);
  }
}

// Panels [begin, end) of those that are given out beforehand, and then of the others as long as there are any, so that
// threads end together although one may be slowed down, by what shares its core or its way to memory.
void run_panels(void* context, int64_t begin, int64_t end) {
  Job& job = *static_cast<Job*>(context);
  const int64_t mine = end - begin;
  if (mine == job.given) return run_range(job, 0, job.panels);  // one thread, which has all of it
  if (mine == 0) return;
  run_range(job, begin, end);
  const int64_t threads = (job.given + mine - 1) / mine;
  const int64_t each = std::max<int64_t>(1, (job.panels - job.given) / threads), piece = std::min(job.piece, each);
  int64_t first = job.next.load(std::memory_order_relaxed);
  while (first < job.panels) {
    const int64_t share = (job.panels - first) / (2 * threads) / piece * piece;
    const int64_t last = std::min(first + std::max(share, piece), job.panels);
    if (!job.next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
    run_range(job, first, last);
    first = job.next.load(std::memory_order_relaxed);
  }
}

// How many of the panels are given out beforehand: most, as whole ranges are read best and one row is little else than
// reading, and all where the rest would not make enough pieces to balance anything. Few where panels differ in rows.
int64_t given_panels(int64_t panels, int64_t rows, int64_t piece, bool even) {
  const int64_t rest = even ? panels / (rows == 1 ? 16 : 4) : panels - panels / 8;
  return rest < 2 * piece ? panels : panels - rest;
}

}  // namespace

void run_products(const Products& products, Compute compute, ParallelFor parallel) {
  Job job{active_kernels(), products, compute};
  int64_t bytes = 0, least = INT64_MAX, most = 0;
  for (int i = 0; i < products.count; ++i) {
    const PackedWeight& w = products.weights[i];
    const PreparedRows& own = products.rows_of(i);
    const int64_t rows = is_integer(compute) ? own.quantized.rows : own.floats.rows;
    least = std::min(least, rows), most = std::max(most, rows);
    job.panels += w.panels();
    bytes += w.panels() * w.panel_bytes() * rows;
  }
  const int64_t panel_bytes = std::max<int64_t>(1, bytes / job.panels);
  job.piece = std::max<int64_t>(1, (kPieceBytes / panel_bytes + 3) / 4 * 4);  // four panels are read at once
  job.next = job.given = given_panels(job.panels, most, job.piece, least == most);
  parallel(job.given, 1 + kThreadBytes / panel_bytes, run_panels, &job);
}

}  // namespace torch_int4
