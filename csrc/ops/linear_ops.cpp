// Schemas of torch.ops.torch_int4 and every check of their arguments. LibTorch stable ABI only.
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "framework/dispatch.h"
#include "framework/linear.h"
#include "framework/memory.h"
#include "framework/pack.h"
#include "framework/types.h"
#include "ops/weights.h"

namespace torch_int4 {
namespace {

using Packed = std::tuple<Tensor, Tensor, Tensor>;

// The tensors of a weight that is not packed, see weights/canonical.py.
struct Canonical {
  const Tensor &codes, &scales;
  const OptionalTensor &zeros, &offsets, &multipliers;
};

void check_parameters(const Canonical& given, const PackedWeight& shape) {
  const std::vector<int64_t> per_group{shape.out_features, shape.groups};
  const ScalarType type = given.scales.scalar_type();
  check_offset(shape);
  if (given.multipliers) {
    const std::vector<int64_t> per_record{shape.out_features, shape.padded_inputs / kRecordInputs};
    check_tensor(given.scales, "scales", ScalarType::Half, "float16 where there are multipliers", per_record);
    if (given.offsets) {
      check_tensor(*given.offsets, "offsets", ScalarType::Half, "float16 where there are multipliers", per_record);
      check_tensor(*given.multipliers, "multipliers", ScalarType::Byte, "uint8 where there are offsets",
                   {per_group[0], per_group[1], 2});
    } else {
      check_tensor(*given.multipliers, "multipliers", ScalarType::Char, "int8 where there are no offsets", per_group);
    }
    return;
  }
  check_tensor(given.scales, "scales", type, "float16, float32 or uint8", per_group);
  if (given.zeros) check_tensor(*given.zeros, "zeros", ScalarType::Byte, "uint8", per_group);
  if (given.offsets) check_tensor(*given.offsets, "offsets", type, "of the type of the scales", per_group);
}

// The shape of what canonical tensors become when they are packed.
PackedWeight check_canonical(const Canonical& given, const WeightOptions& options) {
  const Tensor& codes = given.codes;
  STD_TORCH_CHECK(codes.dim() == 2, "torch_int4: codes must be [out_features, in_features]");
  STD_TORCH_CHECK(!(given.zeros && given.offsets), "torch_int4: give zeros or offsets, not both");
  STD_TORCH_CHECK(!(given.zeros && given.multipliers), "torch_int4: scales of two levels have no integer zeros");
  PackedWeight shape = make_shape(codes.size(0), codes.size(1), options.group_size, options.type);
  check_tensor(codes, "codes", ScalarType::Byte, "uint8", {shape.out_features, shape.in_features});
  shape.scale_type = scale_type(given.scales);
  shape.offset = given.multipliers ? (given.offsets          ? Offset::kTwoLevel
                                      : shape.group == kHalf ? Offset::kTwoLevelHalves
                                                             : Offset::kTwoLevelScale)
                 : given.zeros     ? Offset::kInteger
                 : given.offsets   ? Offset::kFloat
                                   : Offset::kSymmetric;
  check_parameters(given, shape);
  const int bits = code_bits(shape.type), largest = code_mask(shape.type);
  if (bits < 8) {
    const auto* data = static_cast<const uint8_t*>(codes.const_data_ptr());
    uint8_t seen = 0;
    for (int64_t i = 0; i < shape.out_features * shape.in_features; ++i) seen |= data[i];
    STD_TORCH_CHECK(seen <= largest, "torch_int4: codes of a ", bits, "-bit weight must be from 0 to ", largest);
  }
  return shape;
}

void fill_panels(const Tensor& codes, const PackedWeight& shape, Tensor& packed) {
  const auto* data = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* panels = static_cast<uint8_t*>(packed.mutable_data_ptr());
  // The same split over threads as in linear(): each page is first touched by the thread that will read it.
  torch::stable::parallel_for(0, shape.panels(), 1,
                              [&](int64_t begin, int64_t end) { pack_codes(data, shape, begin, end, panels); });
}

void fill_stream(const Tensor& values, const PackedWeight& shape, Tensor& stream) {
  const void* data = values.const_data_ptr();
  void* target = stream.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.panels(), 1, [&](int64_t begin, int64_t end) {
    pack_parameters(data, int(values.element_size()), shape, begin, end, target);
  });
}

TwoLevelParameters view_parameters(const Tensor& scales, const OptionalTensor& offsets, const Tensor& multipliers) {
  const auto halves = [](const Tensor& t) { return static_cast<uint16_t*>(const_cast<void*>(t.const_data_ptr())); };
  return {halves(scales), offsets ? halves(*offsets) : nullptr, const_cast<void*>(multipliers.const_data_ptr())};
}

void fill_records(const Canonical& given, const PackedWeight& shape, Tensor& stream) {
  const TwoLevelParameters parameters = view_parameters(given.scales, given.offsets, *given.multipliers);
  void* target = stream.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.panels(), 1,
                              [&](int64_t begin, int64_t end) { pack_records(parameters, shape, begin, end, target); });
}

Packed pack(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
            const WeightOptions& options, const OptionalTensor& multipliers) {
  const Canonical given{codes, scales, zeros, offsets, multipliers};
  const PackedWeight shape = check_canonical(given, options);
  Tensor packed = torch::stable::new_empty(codes, {shape.panels(), shape.panel_bytes() / kLineBytes, kLineBytes});
  advise_huge_pages(packed.mutable_data_ptr(), size_t(shape.panels() * shape.panel_bytes()));
  fill_panels(codes, shape, packed);
  if (multipliers) {
    Tensor records = torch::stable::new_empty(codes, records_shape(shape));
    fill_records(given, shape, records);
    return {packed, records, torch::stable::new_empty(scales, {0})};
  }
  const auto pack_stream = [&](const Tensor& values) {
    Tensor stream = torch::stable::new_empty(values, {shape.panels(), shape.groups, kPanelRows});
    fill_stream(values, shape, stream);
    return stream;
  };
  Tensor packed_offsets = zeros     ? pack_stream(*zeros)
                          : offsets ? pack_stream(*offsets)
                                    : torch::stable::new_empty(scales, {0});
  return {packed, pack_stream(scales), packed_offsets};
}

void pack_into(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
               Tensor packed, Tensor packed_scales, OptionalTensor packed_offsets, const WeightOptions& options,
               const OptionalTensor& multipliers) {
  const Canonical given{codes, scales, zeros, offsets, multipliers};
  const PackedWeight shape = check_canonical(given, options);
  const PackedWeight target =
      view_weight({packed, packed_scales, packed_offsets}, shape.out_features, shape.in_features, options);
  STD_TORCH_CHECK(target.scale_type == shape.scale_type && target.offset == shape.offset,
                  "torch_int4: packed_scales and packed_offsets must be of the types of the scales and of the zeros or "
                  "offsets, and be there if those are");
  fill_panels(codes, shape, packed);
  if (multipliers) return fill_records(given, shape, packed_scales);
  fill_stream(scales, shape, packed_scales);
  const OptionalTensor& added = zeros ? zeros : offsets;
  if (added) fill_stream(*added, shape, *packed_offsets);
}

// Scales, offsets (empty where there are none) and multipliers, of a weight whose scales have two levels.
Packed unpack_parameters(const Tensor& records, const PackedWeight& w) {
  const int64_t rows = w.out_features, each = w.padded_inputs / kRecordInputs;
  Tensor scales = torch::stable::new_empty(records, {rows, each}, ScalarType::Half);
  const bool adds = adds_offset(w.offset);
  Tensor offsets = adds ? torch::stable::new_empty(scales, {rows, each}) : torch::stable::new_empty(scales, {0});
  Tensor multipliers = adds ? torch::stable::new_empty(records, {rows, w.groups, 2})
                            : torch::stable::new_empty(records, {rows, w.groups}, ScalarType::Char);
  const TwoLevelParameters target = view_parameters(scales, offsets, multipliers);
  torch::stable::parallel_for(0, w.panels(), 4,
                              [&](int64_t begin, int64_t end) { unpack_records(w, begin, end, target); });
  return {scales, offsets, multipliers};
}

Packed unpack(const WeightTensors& given, int64_t out_features, int64_t in_features, const WeightOptions& options) {
  const PackedWeight w = view_weight(given, out_features, in_features, options);
  Tensor codes = torch::stable::new_empty(given.codes, {out_features, in_features});
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  torch::stable::parallel_for(0, w.panels(), 4,
                              [&](int64_t begin, int64_t end) { unpack_codes(w, begin, end, target); });
  if (has_records(w.offset)) {
    auto [scales, offsets, _] = unpack_parameters(given.scales, w);
    return {codes, scales, offsets};
  }
  const auto unpack_stream = [&](const Tensor& stream) {
    Tensor values = torch::stable::new_empty(stream, {out_features, w.groups});
    const void* data = stream.const_data_ptr();
    void* to = values.mutable_data_ptr();
    torch::stable::parallel_for(0, w.panels(), 4, [&](int64_t begin, int64_t end) {
      unpack_parameters(data, int(stream.element_size()), w, begin, end, to);
    });
    return values;
  };
  Tensor offsets = given.offsets ? unpack_stream(*given.offsets) : torch::stable::new_empty(given.scales, {0});
  return {codes, unpack_stream(given.scales), offsets};
}

Tensor unpack_multipliers(const Tensor& scales, int64_t out_features, int64_t in_features) {
  const Offset offset = offset_of_records(scales);
  STD_TORCH_CHECK(has_records(offset), "torch_int4: scales are not those of two levels, which have records of ",
                  record_bytes(Offset::kTwoLevel), ", ", record_bytes(Offset::kTwoLevelScale), " or ",
                  record_bytes(Offset::kTwoLevelHalves), " bytes, but have shape ", shape_text(scales));
  STD_TORCH_CHECK(in_features % kRecordInputs == 0, "torch_int4: in_features must be a multiple of ", kRecordInputs);
  const int64_t group = offset == Offset::kTwoLevelHalves ? kHalf : kSlab;
  PackedWeight w = make_shape(out_features, in_features, group, "int4");  // records are the same for every type
  w.offset = offset;
  check_tensor(scales, "scales", ScalarType::Byte, "uint8", records_shape(w));
  w.scales = scales.const_data_ptr();
  return std::get<2>(unpack_parameters(scales, w));
}

Tensor dequantize_op(const WeightTensors& given, const OptionalTensor& perm, int64_t out_features, int64_t in_features,
                     const WeightOptions& options, ScalarType dtype) {
  const PackedWeight w = view_weight(given, out_features, in_features, options);
  const int64_t* order = check_perm(perm, in_features);
  const DType target_type = float_type(dtype, "dtype");
  Tensor target = torch::stable::new_empty(given.codes, {out_features, in_features}, dtype);
  void* data = target.mutable_data_ptr();
  torch::stable::parallel_for(0, w.panels(), 4,
                              [&](int64_t begin, int64_t end) { dequantize(w, begin, end, order, target_type, data); });
  return target;
}

Tensor int4_linear(const Tensor& x, const LinearTensors& linear, const LinearOptions& options,
                   std::optional<ScalarType> out_dtype) {
  const PackedWeight w = view_weight(linear.weight, options.out_features, input_features(x), options.weight);
  return apply(x, {w}, {linear.bias}, linear.perm, options.compute, out_dtype)[0];
}

std::vector<Tensor> int4_linears(const Tensor& x, const LinearsTensors& linears, const OptionalTensor& perm,
                                 const LinearsOptions& options, std::optional<ScalarType> out_dtype) {
  const std::vector<PackedWeight> views = view_weights(linears, options, input_features(x));
  return apply(x, views, linears.biases, perm, options.compute, out_dtype);
}

Tensor codebook(std::string name) {
  const NamedType* type = find_type(name);
  STD_TORCH_CHECK(type && type->book, "torch_int4: there is no code book '", name, "'");
  Tensor values = torch::stable::empty({16}, ScalarType::Float);
  memcpy(values.mutable_data_ptr(), type->book->values, sizeof type->book->values);
  return values;
}

std::string isa() { return active_kernels().name; }

// Memory whose contents are lost.
void advise_op(Tensor memory) {
  check_tensor(memory, "memory", ScalarType::Byte, "uint8", {memory.numel()});
  advise_huge_pages(memory.mutable_data_ptr(), size_t(memory.numel()));
}

void set_isa(std::string name) { select_kernels(name); }

std::string isas(bool only_supported) {
  std::string text;
  for (const auto& name : kernel_names(only_supported)) text += (text.empty() ? "" : ",") + name;
  return text;
}

STABLE_TORCH_LIBRARY(torch_int4, m) {
  m.def(schema("pack", "(Tensor, Tensor, Tensor)",
               "Tensor codes, Tensor scales, Tensor? zeros=None, Tensor? offsets=None, *", WeightOptions::schema(),
               "Tensor? multipliers=None")
            .c_str());
  m.def(schema("pack_into", "()",
               "Tensor codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor(a!) packed, Tensor(b!) "
               "packed_scales, Tensor(c!)? packed_offsets, *",
               WeightOptions::schema(), "Tensor? multipliers=None")
            .c_str());
  m.def(schema("unpack", "(Tensor, Tensor, Tensor)", WeightTensors::schema(), "*, int out_features, int in_features",
               WeightOptions::schema())
            .c_str());
  m.def("unpack_multipliers(Tensor scales, *, int out_features, int in_features) -> Tensor");
  m.def(schema("dequantize", "Tensor", WeightTensors::schema(), "Tensor? perm, *, int out_features, int in_features",
               WeightOptions::schema(), "ScalarType dtype=float")
            .c_str());
  m.def(schema("int4_linear", "Tensor", "Tensor x", LinearTensors::schema(), "*", LinearOptions::schema(),
               "ScalarType? out_dtype=None")
            .c_str());
  m.def(schema("int4_linears", "Tensor[]", "Tensor x", LinearsTensors::schema(), "Tensor? perm=None, *",
               LinearsOptions::schema(), "ScalarType? out_dtype=None")
            .c_str());
  m.def("codebook(str name) -> Tensor");
  m.def("advise_huge_pages(Tensor(a!) memory) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("isas(bool only_supported) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) {
  m.impl("pack", boxed<&pack>);
  m.impl("pack_into", boxed<&pack_into>);
  m.impl("unpack", boxed<&unpack>);
  m.impl("unpack_multipliers", boxed<&unpack_multipliers>);
  m.impl("dequantize", boxed<&dequantize_op>);
  m.impl("int4_linear", boxed<&int4_linear>);
  m.impl("int4_linears", boxed<&int4_linears>);
  m.impl("advise_huge_pages", TORCH_BOX(&advise_op));
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("codebook", TORCH_BOX(&codebook));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("isas", TORCH_BOX(&isas));
}

}  // namespace
}  // namespace torch_int4
