#include "framework/attention.h"

#include <math.h>
#include <string.h>

#include "framework/buffer.h"
#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

constexpr int64_t kThreadBytes = 1 << 16;  // bytes of keys and values times rows that are worth a thread

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int cache_bytes(CacheType type) { return type == CacheType::kF32 ? 4 : type == CacheType::kInt8 ? 1 : 2; }
int mask_bytes(MaskType type) { return type == MaskType::kBool ? 1 : type == MaskType::kF32 ? 4 : 2; }

const void* offset(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }
void* offset(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

// A row of queries is (token, head of the group): row = token * group + head. All rows of a kv head share its keys.
// One tile of rows: a task is a span of keys, and the task that finishes a kv head last merges its spans, in their
// order. More rows: a task is a tile of rows with all their keys. Nothing depends on the number of threads.
struct Job {
  const IsaKernels& kernels;
  const Attention& a;
  int64_t group, rows;              // query heads per kv head; rows of a kv head
  int64_t tile, tiles;              // rows per task
  int64_t span, first_span, spans;  // keys per task
  int64_t value_lanes;
  float* largest = nullptr;  // of partial results, [batch * kv_heads * spans][rows]
  float* total = nullptr;
  float* sums = nullptr;    // [batch * kv_heads * spans][rows][value_lanes]
  int* finished = nullptr;  // [batch * kv_heads]; of tasks taken, where tasks are handed out
};

// The keys that the mask may allow to row `row` of a kv head.
AttentionRow describe_row(const Attention& a, int64_t batch, int64_t head, int64_t token) {
  AttentionRow row{0, a.length, nullptr, 0};
  const int64_t position = a.length - a.tokens + token;
  if (a.causal) row.last = larger(0, smaller(a.length, position + 1));
  if (a.window > 0) row.first = larger(0, position - a.window + 1);
  if (row.first > row.last) row.first = row.last;
  if (a.mask) {
    const int64_t i = batch * a.mask_batch_stride + head * a.mask_head_stride + token * a.mask_token_stride;
    row.mask = offset(a.mask, i * mask_bytes(a.mask_type));
  }
  if (a.slopes) row.slope = a.slopes[batch * a.slope_batch_stride + head];
  return row;
}

// Row descriptions and queries, times the scale, of rows [first, first + tile.rows) of a kv head.
void prepare_rows(const Job& job, int64_t batch, int64_t kv_head, int64_t first, AttentionTile& tile,
                  AttentionRow* rows, float* query) {
  const Attention& a = job.a;
  const HeadsView& q = a.query;
  const int64_t lanes = padded_lanes(q.dim);
  for (int r = 0; r < tile.rows; ++r, query += lanes) {
    const int64_t token = (first + r) / job.group, head = kv_head * job.group + (first + r) % job.group;
    rows[r] = describe_row(a, batch, head, token);
    const int64_t i = batch * q.batch_stride + token * q.token_stride + head * q.head_stride;
    job.kernels.to_float(offset(q.data, i * element_bytes(q.dtype)), q.dtype, q.dim, query);
    for (int64_t d = 0; d < q.dim; ++d) query[d] *= a.scale;
    for (int64_t d = q.dim; d < lanes; ++d) query[d] = 0;
  }
}

AttentionTile make_tile(const Job& job, int64_t batch, int64_t kv_head) {
  const Attention& a = job.a;
  const auto head = [&](const KeysView& view) {
    return offset(view.data, (batch * view.batch_stride + kv_head * view.head_stride) * cache_bytes(a.type));
  };
  const auto scales = [&](const KeysView& view) {
    return view.scales ? view.scales + batch * view.scale_batch_stride + kv_head * view.scale_head_stride : nullptr;
  };
  AttentionTile t{};
  t.type = a.type;
  t.mask_type = a.mask ? a.mask_type : MaskType::kNone;
  t.keys = head(a.keys);
  t.values = head(a.values);
  t.key_stride = a.keys.key_stride;
  t.value_stride = a.values.key_stride;
  t.key_scales = scales(a.keys);
  t.value_scales = scales(a.values);
  t.dim = a.query.dim;
  t.value_dim = a.values.dim;
  t.softcap = a.softcap;
  return t;
}

// The sum of a row's weights, in units of exp(largest), with that of its sink: a score without a value. A sink far
// above all scores makes it infinite, and the outputs zero, as they round to then.
float with_sink(float sink, float largest, float total) { return total == 0 ? total : total + expf(sink - largest); }

// Divides the weighted values of row `row` of a kv head by their weights; zeros where there are none.
void write_row(const Job& job, int64_t batch, int64_t kv_head, int64_t row, float* sums, float largest, float total) {
  const Attention& a = job.a;
  const int64_t token = row / job.group, head = kv_head * job.group + row % job.group, dim = a.values.dim;
  if (a.sinks) total = with_sink(a.sinks[head], largest, total);
  const float inverse = total == 0 ? 0 : 1 / total;
  for (int64_t d = 0; d < dim; ++d) sums[d] *= inverse;
  const int64_t i = ((batch * a.tokens + token) * a.query.heads + head) * dim;
  job.kernels.from_float(sums, dim, a.query.dtype, false, offset(a.output, i * element_bytes(a.query.dtype)));
}

// Merges the spans of a row, the first one's memory taking the result.
void merge_row(const Job& job, int64_t batch, int64_t kv_head, int64_t row) {
  const int64_t first = (batch * job.a.kv_heads + kv_head) * job.spans;
  float* result = job.sums + (first * job.rows + row) * job.value_lanes;
  float largest = -INFINITY, total = 0;
  for (int64_t s = 0; s < job.spans; ++s) largest = fmaxf(largest, job.largest[(first + s) * job.rows + row]);
  if (largest == -INFINITY) largest = 0;
  for (int64_t s = 0; s < job.spans; ++s) {
    const int64_t i = (first + s) * job.rows + row;
    const float weight = expf(job.largest[i] - largest);
    const float* sums = job.sums + i * job.value_lanes;
    total += weight * job.total[i];
    if (s == 0) {
      for (int64_t d = 0; d < job.value_lanes; ++d) result[d] *= weight;
    } else {
      for (int64_t d = 0; d < job.value_lanes; ++d) result[d] += weight * sums[d];
    }
  }
  write_row(job, batch, kv_head, row, result, largest, total);
}

// Tasks [begin, end) of (batch, kv head, span).
void run_spans(void* context, int64_t begin, int64_t end) {
  thread_local Buffer scratch, queries;
  const Job& job = *static_cast<const Job*>(context);
  AttentionRow rows[kManyRows];
  const bool few = job.rows <= kFewRows;
  float* query = queries.get<float>(job.rows * padded_lanes(job.a.query.dim));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t unit = task / job.spans, span = job.first_span + task % job.spans;
    const int64_t batch = unit / job.a.kv_heads, kv_head = unit % job.a.kv_heads;
    AttentionTile t = make_tile(job, batch, kv_head);
    t.begin = span * job.span;
    t.end = smaller(t.begin + job.span, job.a.length);
    t.rows = int(job.rows);
    t.row = rows;
    t.query = query;
    t.scratch = scratch.get<float>(few ? few_scratch() : many_scratch(t.dim, t.value_dim));
    t.largest = job.largest + task * job.rows;
    t.total = job.total + task * job.rows;
    t.sums = job.sums + task * job.rows * job.value_lanes;
    if (task == begin || task % job.spans == 0) prepare_rows(job, batch, kv_head, 0, t, rows, query);
    few ? job.kernels.attend_few(t) : job.kernels.attend_many(t);
    if (__atomic_add_fetch(&job.finished[unit], 1, __ATOMIC_ACQ_REL) < job.spans) continue;
    for (int64_t row = 0; row < job.rows; ++row) merge_row(job, batch, kv_head, row);
  }
}

void run_tile(const Job& job, int64_t unit, int64_t tile, Buffer& buffer) {
  const int64_t batch = unit / job.a.kv_heads, kv_head = unit % job.a.kv_heads, first = tile * job.tile;
  const int64_t dim = padded_lanes(job.a.query.dim);
  AttentionRow rows[kManyRows];
  AttentionTile t = make_tile(job, batch, kv_head);
  t.begin = 0;
  t.end = job.a.length;
  t.rows = int(smaller(job.tile, job.rows - first));
  t.row = rows;
  float* memory = buffer.get<float>(many_scratch(dim, job.value_lanes) + kManyRows * (dim + job.value_lanes + 2));
  t.scratch = memory;
  float* query = memory + many_scratch(dim, job.value_lanes);
  t.sums = query + kManyRows * dim;
  t.largest = t.sums + kManyRows * job.value_lanes;
  t.total = t.largest + kManyRows;
  t.query = query;
  prepare_rows(job, batch, kv_head, first, t, rows, query);
  job.kernels.attend_many(t);
  for (int r = 0; r < t.rows; ++r) {
    write_row(job, batch, kv_head, first + r, t.sums + r * job.value_lanes, t.largest[r], t.total[r]);
  }
}

// Threads take tiles one by one, the last rows first: with a causal mask those see the most keys.
void run_tiles(void* context, int64_t, int64_t) {
  thread_local Buffer buffer;
  const Job& job = *static_cast<const Job*>(context);
  const int64_t units = job.a.batch * job.a.kv_heads;
  for (;;) {
    const int64_t task = __atomic_fetch_add(job.finished, 1, __ATOMIC_RELAXED);
    if (task >= units * job.tiles) break;
    run_tile(job, task % units, job.tiles - 1 - task / units, buffer);
  }
  buffer.trim(kKeptBytes);
}

// Keys per task, in whole tiles: spans alike in length, and, where heads are few, so many that threads come out even,
// whatever their number. A task of many rows has more to prepare. The batch has no say: alone or in a batch, a sequence
// gives the same bits.
int64_t span_of(bool few, int64_t keys, int64_t kv_heads) {
  const int64_t enough = few ? 8 : 4;
  int64_t spans = quotient_up(keys, few ? kSpan : kManySpan);
  while (kv_heads * spans < enough && keys >= 2 * spans * kKeyTile) spans *= 2;
  return quotient_up(quotient_up(keys, spans), kKeyTile) * kKeyTile;
}

void attend_spans(Job& job, ParallelFor parallel) {
  thread_local Buffer partial, counters;
  const Attention& a = job.a;
  const int64_t units = a.batch * a.kv_heads;
  const int64_t first_key = a.window > 0 ? larger(0, a.length - a.tokens - a.window + 1) : 0;
  job.span = span_of(job.rows <= kFewRows, a.length - first_key, a.kv_heads);
  job.first_span = smaller(first_key, a.length - 1) / job.span;
  job.spans = quotient_up(a.length, job.span) - job.first_span;
  const int64_t results = units * job.spans * job.rows;
  job.largest = partial.get<float>(results * (2 + job.value_lanes));
  job.total = job.largest + results;
  job.sums = job.total + results;
  job.finished = counters.get<int>(units);
  memset(job.finished, 0, size_t(units) * sizeof(int));
  const int64_t bytes = smaller(job.span, a.length) * (a.query.dim + a.values.dim) * cache_bytes(a.type);
  parallel(units * job.spans, 1 + kThreadBytes / (bytes * job.rows + 1), run_spans, &job);
  partial.trim(kKeptBytes);
}

}  // namespace

void attention(const Attention& a, ParallelFor parallel) {
  const int64_t group = a.query.heads / a.kv_heads, units = a.batch * a.kv_heads;
  Job job{active_kernels(), a, group, a.tokens * group, 0, 0, 0, 0, 0, padded_lanes(a.values.dim)};
  if (units * job.rows == 0 || a.values.dim == 0) return;
  if (a.length == 0) {
    memset(a.output, 0, size_t(units * job.rows * a.values.dim * element_bytes(a.query.dtype)));
    return;
  }
  if (job.rows <= kManyRows) return attend_spans(job, parallel);
  job.tile = kManyRows;
  job.tiles = quotient_up(job.rows, job.tile);
  int taken = 0;
  job.finished = &taken;
  parallel(units * job.tiles, 1, run_tiles, &job);
}

}  // namespace torch_int4
