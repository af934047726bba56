// Arguments of operators that go together. A noun spells its part of a schema and reads it off the stack; operators
// that take the noun say neither again. LibTorch stable ABI only.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/tensors.h"

namespace torch_int4 {

// The arguments of an operator's call, in the order of its schema.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T next() {
    if constexpr (is_noun<T>(0)) return T::read(*this);
    else return torch::stable::detail::to<T>(*next_++);
  }

  const StableIValue* position() const { return next_; }

 private:
  template <class T>
  static constexpr auto is_noun(int) -> decltype(&T::schema, true) {
    return true;
  }
  template <class T>
  static constexpr bool is_noun(...) {
    return false;
  }

  StableIValue* next_;
};

// The parts of a schema, as one text.
template <class... Part>
std::string listed(const Part&... parts) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + std::string(parts)), ...);
  return text;
}

// "name(parts) -> result", which `def` of a library takes.
template <class... Part>
std::string schema(const char* name, const char* result, const Part&... parts) {
  return std::string(name) + "(" + listed(parts...) + ") -> " + result;
}

template <class Function>
struct Signature;
template <class Result, class... Parameter>
struct Signature<Result (*)(Parameter...)> {
  using type = Result;
  using Values = std::tuple<std::remove_cv_t<std::remove_reference_t<Parameter>>...>;

  template <class... T>
  static std::tuple<T...> read(Arguments& arguments, std::tuple<T...>*) {
    return {arguments.next<T>()...};  // braces: in order
  }
};

template <class T>
void give_back(StableIValue* stack, T&& result) {
  stack[0] = torch::stable::detail::from(std::forward<T>(result));
}

template <class... T>
void give_back(StableIValue* stack, std::tuple<T...>&& results) {
  std::apply([&](T&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); }, results);
}

// TORCH_BOX for functions that take nouns.
template <auto function>
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
  using Its = Signature<decltype(function)>;
  Arguments arguments(stack);
  typename Its::Values values = Its::read(arguments, static_cast<typename Its::Values*>(nullptr));
  STD_TORCH_CHECK(arguments.position() == stack + count,
                  "torch_int4: a schema and its operator have different arguments");
  if constexpr (std::is_void_v<typename Its::type>) std::apply(function, std::move(values));
  else give_back(stack, std::apply(function, std::move(values)));
}

struct WeightOptions {
  int64_t group_size;
  std::string type;

  static std::string schema() { return "int group_size, str weight_type=\"int4\""; }
  static WeightOptions read(Arguments& a) { return {a.next<int64_t>(), a.next<std::string>()}; }
};

// A packed weight; see kernels/kernel.h.
struct WeightTensors {
  Tensor codes, scales;
  OptionalTensor offsets;

  static std::string schema() { return "Tensor weight, Tensor scales, Tensor? offsets"; }
  static WeightTensors read(Arguments& a) { return {a.next<Tensor>(), a.next<Tensor>(), a.next<OptionalTensor>()}; }
};

// One linear.
struct LinearTensors {
  WeightTensors weight;
  OptionalTensor bias, perm;

  static std::string schema() { return WeightTensors::schema() + "=None, Tensor? bias=None, Tensor? perm=None"; }
  static LinearTensors read(Arguments& a) {
    return {a.next<WeightTensors>(), a.next<OptionalTensor>(), a.next<OptionalTensor>()};
  }
};

// Several linears, in lists of one length.
struct LinearsTensors {
  std::vector<Tensor> codes, scales;
  std::vector<OptionalTensor> offsets, biases;

  size_t count() const { return codes.size(); }
  WeightTensors weight(size_t i) const { return {codes[i], scales[i], offsets[i]}; }

  static std::string schema() { return "Tensor[] weights, Tensor[] scales, Tensor?[] offsets, Tensor?[] biases"; }
  static LinearsTensors read(Arguments& a) {
    return {a.next<std::vector<Tensor>>(), a.next<std::vector<Tensor>>(), a.next<std::vector<OptionalTensor>>(),
            a.next<std::vector<OptionalTensor>>()};
  }
};

struct LinearOptions {
  int64_t out_features;
  WeightOptions weight;
  std::string compute;

  static std::string schema() { return listed("int out_features", WeightOptions::schema(), "str compute=\"int8\""); }
  static LinearOptions read(Arguments& a) {
    return {a.next<int64_t>(), a.next<WeightOptions>(), a.next<std::string>()};
  }
};

// Of several linears, whose weights may differ. One group size, or one type, stands for all; types are the names of
// each with commas in between.
struct LinearsOptions {
  std::vector<int64_t> out_features, group_sizes;
  std::vector<std::string> types;
  std::string compute;

  WeightOptions weight(size_t i) const {
    return {group_sizes[group_sizes.size() == 1 ? 0 : i], types[types.size() == 1 ? 0 : i]};
  }

  static std::string schema() {
    return listed("int[] out_features", "int[1] group_size, str weight_type=\"int4\"", "str compute=\"int8\"");
  }
  static LinearsOptions read(Arguments& a) {
    LinearsOptions o{a.next<std::vector<int64_t>>(), a.next<std::vector<int64_t>>(), split(a.next<std::string>()),
                     a.next<std::string>()};
    const auto fits = [&](size_t count) { return count == 1 || count == o.out_features.size(); };
    STD_TORCH_CHECK(fits(o.group_sizes.size()) && fits(o.types.size()),
                    "torch_int4: group_size and weight_type must be one for all of the ", o.out_features.size(),
                    " weights, or one for each, and are ", o.group_sizes.size(), " and ", o.types.size());
    return o;
  }

 private:
  static std::vector<std::string> split(const std::string& names) {
    std::vector<std::string> result(1);
    for (const char c : names) {
      if (c == ',') result.emplace_back();
      else result.back() += c;
    }
    return result;
  }
};

// How norms compute.
struct NormOptions {
  std::string kind;
  double eps, offset;

  static std::string schema() { return "str norm=\"rms\", float eps=1e-6, float norm_offset=0."; }
  static NormOptions read(Arguments& a) { return {a.next<std::string>(), a.next<double>(), a.next<double>()}; }
};

// The caches of a layer, which operators write.
struct Caches {
  Tensor keys, values;
  OptionalTensor key_scales, value_scales;
  Tensor length;

  static std::string schema() {
    return "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!)? key_scales, Tensor(d!)? value_scales, "
           "Tensor(e!) length";
  }
  static Caches read(Arguments& a) {
    return {a.next<Tensor>(), a.next<Tensor>(), a.next<OptionalTensor>(), a.next<OptionalTensor>(), a.next<Tensor>()};
  }
};

// All tensors of a decoder layer that stay the same from call to call.
struct LayerTensors {
  std::vector<Tensor> norm_weights;
  std::vector<OptionalTensor> norm_biases;
  std::vector<Tensor> head_norms;
  LinearsTensors linears;
  std::vector<OptionalTensor> perms;

  static std::string schema() {
    return listed("Tensor[] norm_weights, Tensor?[] norm_biases, Tensor[] head_norms", LinearsTensors::schema(),
                  "Tensor?[] perms");
  }
  static LayerTensors read(Arguments& a) {
    return {a.next<std::vector<Tensor>>(), a.next<std::vector<OptionalTensor>>(), a.next<std::vector<Tensor>>(),
            a.next<LinearsTensors>(), a.next<std::vector<OptionalTensor>>()};
  }
};

struct LayerOptions {
  LinearsOptions linears;
  std::string activation;
  NormOptions norm;
  int64_t projections;
  bool parallel_residual, interleaved;

  static std::string schema() {
    return listed(LinearsOptions::schema(), "str activation=\"silu\"", NormOptions::schema(),
                  "int projections=3, bool parallel_residual=False, bool interleaved=False");
  }
  static LayerOptions read(Arguments& a) {
    return {a.next<LinearsOptions>(), a.next<std::string>(), a.next<NormOptions>(),
            a.next<int64_t>(),        a.next<bool>(),        a.next<bool>()};
  }
};

}  // namespace torch_int4
