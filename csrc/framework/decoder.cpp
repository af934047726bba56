#include "framework/decoder.h"

#include "framework/buffer.h"

namespace torch_int4 {
namespace {

// The results of the steps of a layer, all of the type of x.
struct Workspace {
  char *projected, *rotated, *attended, *middle;
};

Workspace reserve(const DecoderLayer& l, Buffer& buffer) {
  const int64_t row_bytes = l.x.rows * element_bytes(l.x.dtype);
  const auto lines = [&](int64_t features) { return (row_bytes * features + 63) / 64 * 64; };
  int64_t features = 0;
  for (int i = 0; i < l.projections; ++i) features += l.weights[i].out_features;
  const int64_t projected = lines(features), rotated = lines(l.rotary.query.heads * l.rotary.query.dim);
  const int64_t attended = lines(l.weights[l.projections].in_features), middle = lines(l.weights[0].in_features);
  char* memory = buffer.get<char>(projected + rotated + attended + middle);
  return {memory, memory + projected, memory + projected + rotated, memory + projected + rotated + attended};
}

void project(const DecoderLayer& l, char* target, ParallelFor parallel) {
  Output outputs[3];
  for (int i = 0; i < l.projections; ++i) {
    const int64_t features = l.weights[i].out_features;
    outputs[i] = {target, l.x.dtype, features, l.biases[i], 1};
    target += l.x.rows * features * element_bytes(l.x.dtype);
  }
  linear(l.weights, outputs, l.projections, l.x, l.compute, parallel);
}

// Query, key and value inside the projected row.
void view_projected(DecoderLayer& l, const char* data) {
  RotaryAppend& r = l.rotary;
  const int64_t bytes = element_bytes(l.x.dtype), dim = r.query.dim;
  HeadsView* views[] = {&r.query, &r.key, &r.value};
  for (HeadsView* view : views) view->dtype = l.x.dtype, view->head_stride = view->dim;
  if (l.projections == 3) {
    for (HeadsView* view : views) {
      view->data = data;
      view->token_stride = view->heads * view->dim;
      data += l.x.rows * view->token_stride * bytes;
    }
  } else {
    const int64_t group = r.query.heads / r.key.heads, group_features = (group + 2) * dim;
    for (HeadsView* view : views) view->data = data, view->token_stride = r.key.heads * group_features;
    r.query.group = group;
    r.query.group_stride = r.key.head_stride = r.value.head_stride = group_features;
    r.key.data = data + group * dim * bytes;
    r.value.data = data + (group + 1) * dim * bytes;
  }
  for (HeadsView* view : views) view->batch_stride = r.tokens * view->token_stride;
}

void attend(DecoderLayer& l, const Workspace& w, ParallelFor parallel) {
  view_projected(l, w.projected);
  l.rotary.rotated = w.rotated;
  rotary_append(l.rotary, parallel);
  HeadsView& q = l.attention.query;
  q = {w.rotated, l.x.dtype, l.rotary.query.heads, l.rotary.query.dim, 0, 0, l.rotary.query.dim};
  q.token_stride = q.heads * q.dim;
  q.batch_stride = l.rotary.tokens * q.token_stride;
  l.attention.output = w.attended;
  attention(l.attention, parallel);
}

}  // namespace

void decoder_layer(DecoderLayer& l, ParallelFor parallel) {
  thread_local Buffer buffer;
  const Workspace w = reserve(l, buffer);
  project(l, w.projected, parallel);
  attend(l, w, parallel);

  const int output = l.projections, first = output + 1;
  const int64_t features = l.weights[output].out_features;
  const Input attended{w.attended, l.x.dtype, l.x.rows, l.perms[output]};
  const Output sum{w.middle, l.x.dtype, features, l.biases[output], 1, l.x.data};
  linear(l.weights + output, &sum, 1, attended, l.compute, parallel);

  Mlp m{};
  m.x = {l.parallel ? l.x.data : w.middle, l.x.dtype, l.x.rows, l.perms[first], l.mlp_norm};
  m.gated = l.gated;
  const int count = l.gated ? 3 : 2;
  for (int i = 0; i < count; ++i) m.weights[i] = l.weights[first + i], m.biases[i] = l.biases[first + i];
  m.down_perm = l.perms[first + count - 1];
  m.activation = l.activation;
  m.output = {l.output, l.x.dtype, features, nullptr, 1, w.middle};
  mlp(m, l.compute, parallel);
  buffer.trim(kKeptBytes);
}

}  // namespace torch_int4
