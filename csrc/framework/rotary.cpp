// Rotation of queries and keys, and the cache that takes the keys and values.
#include <string.h>

#include "framework/attention.h"
#include "framework/buffer.h"
#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

constexpr int64_t kThreadElements = 1 << 14;  // elements of queries, keys and values that are worth a thread

DType cache_float(CacheType type) {
  return type == CacheType::kF32 ? DType::kF32 : type == CacheType::kBF16 ? DType::kBF16 : DType::kF16;
}

struct Job {
  const IsaKernels& kernels;
  const RotaryAppend& a;
};

// Memory for one head.
struct Workspace {
  float *x, *cos, *sin;
  int8_t* codes;
  char* rounded;
};

const void* element(const HeadsView& view, int64_t batch, int64_t token, int64_t head) {
  const int64_t group = view.group ? head / view.group : 0, in_group = head - group * view.group;
  const int64_t i =
      batch * view.batch_stride + token * view.token_stride + group * view.group_stride + in_group * view.head_stride;
  return static_cast<const char*>(view.data) + i * element_bytes(view.dtype);
}

// One head of a token as floats, normalized, rotated, and rounded to its own type again.
void load_head(const Job& job, const HeadsView& view, const void* source, const RowNorm* norm, bool rotated,
               const Workspace& w) {
  job.kernels.to_float(source, view.dtype, view.dim, w.x);
  if (norm) job.kernels.normalize(w.x, view.dim, *norm, w.x);
  if (!rotated || !job.a.rotary_dim) return;
  job.kernels.rotate(w.x, w.cos, w.sin, job.a.rotary_dim, job.a.interleaved);
  if (view.dtype == DType::kF32) return;
  job.kernels.from_float(w.x, view.dim, view.dtype, false, w.rounded);
  job.kernels.to_float(w.rounded, view.dtype, view.dim, w.x);
}

void store_int8(const Job& job, int64_t dim, const Workspace& w, int8_t* target, float* scale) {
  const int64_t padded = (dim + kSlab - 1) / kSlab * kSlab;
  int32_t sum;
  float scaled_sum;
  memset(w.x + dim, 0, size_t(padded - dim) * sizeof(float));
  job.kernels.quantize(w.x, padded, padded, QuantizedRows{w.codes, scale, &sum, &scaled_sum, 1}, 0, 1);
  memcpy(target, w.codes, size_t(dim));
}

void append_heads(const Job& job, int64_t batch, int64_t token, const HeadsView& view, bool rotated,
                  const CacheTarget& cache, const Workspace& w) {
  const RotaryAppend& a = job.a;
  const DType dtype = cache_float(a.type);
  const bool rotates = rotated && a.rotary_dim;
  const RowNorm* norm = rotated ? a.key_norm : nullptr;
  const bool copies = !rotates && !norm && a.type != CacheType::kInt8 && dtype == view.dtype && dtype != DType::kF16;
  for (int64_t head = 0; head < view.heads; ++head) {
    const void* source = element(view, batch, token, head);
    const int64_t row = (batch * view.heads + head) * a.capacity + a.length + token;
    if (!copies) load_head(job, view, source, norm, rotated, w);
    if (a.type == CacheType::kInt8) {
      store_int8(job, view.dim, w, static_cast<int8_t*>(cache.data) + row * view.dim, cache.scales + row);
      continue;
    }
    char* target = static_cast<char*>(cache.data) + row * view.dim * element_bytes(dtype);
    if (copies) memcpy(target, source, size_t(view.dim * element_bytes(dtype)));
    else job.kernels.from_float(w.x, view.dim, dtype, true, target);
  }
}

void rotate_query(const Job& job, int64_t batch, int64_t token, const Workspace& w) {
  const RotaryAppend& a = job.a;
  const HeadsView& q = a.query;
  const int64_t bytes = q.dim * element_bytes(q.dtype);
  char* target = static_cast<char*>(a.rotated) + (batch * a.tokens + token) * q.heads * bytes;
  for (int64_t head = 0; head < q.heads; ++head, target += bytes) {
    const void* source = element(q, batch, token, head);
    if (!a.rotary_dim && !a.query_norm) {
      memcpy(target, source, size_t(bytes));
      continue;
    }
    job.kernels.to_float(source, q.dtype, q.dim, w.x);
    if (a.query_norm) job.kernels.normalize(w.x, q.dim, *a.query_norm, w.x);
    if (a.rotary_dim) job.kernels.rotate(w.x, w.cos, w.sin, a.rotary_dim, a.interleaved);
    job.kernels.from_float(w.x, q.dim, q.dtype, false, target);
  }
}

// Tokens [begin, end) of all batches.
void run_tokens(void* context, int64_t begin, int64_t end) {
  thread_local Buffer floats, bytes;
  const Job& job = *static_cast<const Job*>(context);
  const RotaryAppend& a = job.a;
  const int64_t widest = a.query.dim > a.value.dim ? a.query.dim : a.value.dim;
  const int64_t dim = (widest + kSlab - 1) / kSlab * kSlab;
  Workspace w{};
  w.x = floats.get<float>(3 * dim);
  w.cos = w.x + dim;
  w.sin = w.cos + dim;
  w.codes = bytes.get<int8_t>(5 * dim);
  w.rounded = reinterpret_cast<char*>(w.codes) + dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / a.tokens, token = i % a.tokens;
    const auto angles = [&](const void* data, int64_t batch_stride, int64_t token_stride, float* target) {
      const int64_t at = batch * batch_stride + token * token_stride;
      job.kernels.to_float(static_cast<const char*>(data) + at * element_bytes(a.angle_type), a.angle_type,
                           a.rotary_dim / 2, target);
    };
    if (a.rotary_dim) {
      angles(a.cos, a.cos_batch_stride, a.cos_token_stride, w.cos);
      angles(a.sin, a.sin_batch_stride, a.sin_token_stride, w.sin);
    }
    rotate_query(job, batch, token, w);
    append_heads(job, batch, token, a.key, true, a.key_cache, w);
    append_heads(job, batch, token, a.value, false, a.value_cache, w);
  }
}

}  // namespace

void rotary_append(const RotaryAppend& a, ParallelFor parallel) {
  Job job{active_kernels(), a};
  const int64_t elements = a.query.heads * a.query.dim + a.key.heads * (a.key.dim + a.value.dim);
  parallel(a.batch * a.tokens, 1 + kThreadElements / (elements + 1), run_tokens, &job);
}

}  // namespace torch_int4
