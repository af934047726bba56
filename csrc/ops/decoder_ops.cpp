// Schemas of the operators of a whole decoder layer, and the layers that were prepared. LibTorch stable ABI only.
#include <exception>
#include <utility>

#include "ops/decoder_views.h"
#include "ops/registry.h"

namespace torch_int4 {
namespace {

Tensor empty_output(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "torch_int4: x must be [batch, tokens, features], not ", shape_text(x));
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

Tensor decoder_layer_op(const Tensor& x, const LayerTensors& tensors, const OptionalTensor& cos,
                        const OptionalTensor& sin, const Caches& caches, const OptionalTensor& mask,
                        const LayerOptions& options, int64_t rotary_dim, double scale, double softcap) {
  check_view(caches.keys, "key_cache", 4);
  check_view(caches.values, "value_cache", 4);
  PreparedLayer p{tensors, options};
  prepare_layer(p, input_features(x), {caches.keys.size(1), caches.keys.size(3), caches.values.size(3)});
  const LayerState state{cos, sin, caches, mask};
  const Tensor contiguous = make_contiguous(x);
  Tensor y = empty_output(x);
  thread_local LayerView view;
  view_layer(p, contiguous, state, rotary_dim, scale, softcap, y, view);
  run_layer(view, caches.length);
  return y;
}

Registry<PreparedLayer>& registry() {
  static auto* const all =
      new Registry<PreparedLayer>;  // never destroyed: at exit torch may be gone before its tensors
  return *all;
}

int64_t prepare_op(const LayerTensors& tensors, const LayerOptions& options, int64_t kv_heads, int64_t head_size,
                   int64_t value_size) {
  const std::vector<Tensor>& norms = tensors.norm_weights;
  STD_TORCH_CHECK(!norms.empty() && norms[0].dim() == 1, "torch_int4: norm_weights must be [features]");
  auto p = std::make_shared<PreparedLayer>(PreparedLayer{tensors, options});
  prepare_layer(*p, norms[0].size(0), {kv_heads, head_size, value_size});
  return registry().add(std::move(p));
}

// One of several layers in a call.
struct LayerCall {
  std::shared_ptr<const PreparedLayer> layer;
  std::exception_ptr error;
};

// The arguments of a call of prepared layers, and each layer's own call.
struct Stack {
  Tensor x;  // contiguous
  const std::vector<int64_t>& layers;
  const OptionalTensor &cos, &sin;
  const std::vector<Tensor>&key_caches, &value_caches;
  const std::vector<OptionalTensor>&key_scales, &value_scales;
  const std::vector<Tensor>& lengths;
  const OptionalTensor& mask;
  int64_t rotary_dim;
  double scale, softcap;
  Tensor outputs[2];  // which take turns
  LayerView* views;
  LayerCall* calls;

  LayerState state(size_t i) const {
    return {cos, sin, {key_caches[i], value_caches[i], key_scales[i], value_scales[i], lengths[i]}, mask};
  }
};

void view_layers(void* context, int64_t begin, int64_t end) {
  Stack& s = *static_cast<Stack*>(context);
  for (auto i = size_t(begin); i < size_t(end); ++i) {
    try {
      s.calls[i].layer = registry().find(s.layers[i], "layer");
      view_layer(*s.calls[i].layer, i ? s.outputs[(i - 1) % 2] : s.x, s.state(i), s.rotary_dim, s.scale, s.softcap,
                 s.outputs[i % 2], s.views[i]);
    } catch (...) {
      s.calls[i].error = std::current_exception();
    }
  }
}

// One prepared layer after the other, each on the output of the one before, with caches of their own. All are viewed
// before the first one runs: nothing has changed if an argument is wrong, and threads share work that mostly waits for
// memory, as the weights of a token push the tensors that describe them out of the caches.
Tensor prepared_op(const Tensor& x, std::vector<int64_t> layers, const OptionalTensor& cos, const OptionalTensor& sin,
                   std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                   std::vector<OptionalTensor> key_scales, std::vector<OptionalTensor> value_scales,
                   std::vector<Tensor> lengths, const OptionalTensor& mask, int64_t rotary_dim, double scale,
                   double softcap) {
  constexpr int64_t kThreadLayers = 2;  // worth a thread
  const size_t count = layers.size();
  STD_TORCH_CHECK(count > 0 && key_caches.size() == count && value_caches.size() == count &&
                      key_scales.size() == count && value_scales.size() == count && lengths.size() == count,
                  "torch_int4: layers, key_caches, value_caches, key_scales, value_scales and lengths must be lists of "
                  "one length, and not empty");
  thread_local std::vector<LayerView> views;
  if (views.size() < count) views.resize(count);
  std::vector<LayerCall> calls(count);
  Stack stack{
      make_contiguous(x), layers,      cos,  sin,        key_caches, value_caches, key_scales,
      value_scales,       lengths,     mask, rotary_dim, scale,      softcap,      {empty_output(x), empty_output(x)},
      views.data(),       calls.data()};
  parallel(int64_t(count), kThreadLayers, view_layers, &stack);
  for (const LayerCall& call : calls) {
    if (call.error) std::rethrow_exception(call.error);
  }
  for (size_t i = 0; i < count; ++i) run_layer(views[i], lengths[i]);
  return stack.outputs[(count - 1) % 2];
}

void release_op(int64_t layer) { registry().remove(layer); }

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def(schema("decoder_layer", "Tensor", "Tensor x", LayerTensors::schema(), "Tensor? cos, Tensor? sin",
               Caches::schema(), "Tensor? mask=None, *", LayerOptions::schema(),
               "int rotary_dim=0, float scale, float softcap=0.")
            .c_str());
  m.def(schema("prepare_decoder_layer", "int", LayerTensors::schema(), "*", LayerOptions::schema(),
               "int kv_heads, int head_size, int value_size")
            .c_str());
  m.def(
      "prepared_decoder_layers(Tensor x, int[] layers, Tensor? cos, Tensor? sin, Tensor(a!)[] key_caches, "
      "Tensor(b!)[] value_caches, Tensor?[] key_scales, Tensor?[] value_scales, Tensor(c!)[] lengths, Tensor? mask, "
      "int rotary_dim, float scale, float softcap) -> Tensor");
  m.def("release_decoder_layer(int layer) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("decoder_layer", boxed<&decoder_layer_op>);
  m.impl("prepare_decoder_layer", boxed<&prepare_op>);
  m.impl("prepared_decoder_layers", TORCH_BOX(&prepared_op));
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("release_decoder_layer", TORCH_BOX(&release_op));
}

}  // namespace
}  // namespace torch_int4
