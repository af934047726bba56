// A product of the framework on operands in guarded memory, for any shape, type and compute.
#pragma once
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "framework/codebooks.h"
#include "framework/linear.h"
#include "framework/pack.h"
#include "guarded.h"
#include "kernels/scalar.h"

using namespace torch_int4;

namespace {

enum class Data { kRandom, kExtremes, kNotFinite };

struct Case {
  int64_t rows, out_features, in_features, group;
  WeightType type;
  Offset offset;
  Compute compute;
  DType dtype;
  Data data;
  ScaleType scale_type;
  bool perm;
  int norm = 0;  // none, RMS, RMS with an offset, layer
  bool residual = false;
};

std::string describe(const Case& c) {
  char text[200];
  snprintf(text, sizeof text,
           "M=%d N=%d K=%d group=%d type=%d offset=%d compute=%d dtype=%d data=%d scales=%d perm=%d "
           "norm=%d residual=%d",
           int(c.rows), int(c.out_features), int(c.in_features), int(c.group), int(c.type), int(c.offset),
           int(c.compute), int(c.dtype), int(c.data), int(c.scale_type), c.perm, c.norm, c.residual);
  return text;
}

PackedWeight shape_of(const Case& c) {
  PackedWeight w{};
  w.out_features = c.out_features;
  w.in_features = c.in_features;
  w.type = c.type;
  w.offset = c.offset;
  w.scale_type = c.scale_type;
  const Codebook* const books[] = {&kNf4, &kFp4, &kBnbFp4};
  if (c.type == WeightType::kBook) w.book = books[c.rows % 3];
  w.padded_inputs = (c.in_features + kSlab - 1) / kSlab * kSlab;
  w.group = c.group == -1 || c.group > w.padded_inputs ? w.padded_inputs : c.group;
  w.groups = (w.padded_inputs + w.group - 1) / w.group;
  w.block = smaller(w.group, kMaxBlock);
  w.blocks = (w.padded_inputs + w.block - 1) / w.block;
  return w;
}

float element(const Case& c, Random& random, int64_t row, int64_t k) {
  if (c.data == Data::kExtremes) return (row + k) % 2 ? -3e4f : 3e4f;
  if (c.data == Data::kNotFinite && row == 1) return k == c.in_features - 1 ? NAN : 1.f;
  if (c.data == Data::kNotFinite && row == 2) return k == 0 ? -INFINITY : 0.f;
  if (c.data == Data::kNotFinite && row == 3) return 0.f;
  return random.normal();
}

// The operands of one case in guarded memory; `run` multiplies them with the kernel set in use.
class Problem {
 public:
  Problem(const Case& c, bool at_end)
      : case_(c),
        w_(shape_of(c)),
        parameters_(w_.panels() * w_.groups * kPanelRows),
        bytes_(element_bytes(c.dtype)),
        codes_(size_t(w_.panels() * w_.panel_bytes()), at_end),
        scales_(size_t(two_levels() ? records() * record_bytes(c.offset) : parameters_ * scale_bytes()), at_end),
        offsets_(size_t(two_levels() ? 0 : parameters_ * offset_bytes()), at_end),
        bias_(size_t(c.out_features * 4), at_end),
        perm_(size_t(c.in_features * 8), at_end),
        x_(size_t(c.rows * c.in_features * bytes_), at_end),
        norm_weight_(size_t(c.in_features * 4), at_end),
        norm_bias_(size_t(c.in_features * 4), at_end),
        residual_(size_t(c.rows * c.out_features * bytes_), at_end),
        y_(size_t(c.rows * c.out_features * bytes_), at_end) {
    fill();
  }

  std::vector<char> run(int64_t first_row, int64_t rows) {
    char* y = y_.as<char>();
    memset(y, 0xee, size_t(rows * case_.out_features * bytes_));
    Input input{x_.as<char>() + first_row * case_.in_features * bytes_, case_.dtype, rows,
                case_.perm ? perm_.as<int64_t>() : nullptr};
    const bool layer = case_.norm == 3;
    const RowNorm norm{layer ? Norm::kLayer : Norm::kRms,
                       case_.dtype,
                       1e-5f,
                       case_.norm == 2 ? 1.f : 0.f,
                       norm_weight_.as<float>(),
                       layer ? norm_bias_.as<float>() : nullptr};
    if (case_.norm) input.norm = &norm;
    Output output{y, case_.dtype, case_.out_features, bias_.as<float>(), 1};
    if (case_.residual) output.residual = residual_.as<char>() + first_row * case_.out_features * bytes_;
    // Two uneven parts, as two threads would get them.
    const auto parallel = [](int64_t count, int64_t, ParallelBody body, void* context) {
      body(context, 0, count / 3);
      body(context, count / 3, count);
    };
    linear(&w_, &output, 1, input, case_.compute, parallel);
    return {y, y + rows * case_.out_features * bytes_};
  }

  size_t row_bytes() const { return size_t(case_.out_features * bytes_); }

 private:
  int64_t offset_bytes() const { return w_.offset == Offset::kInteger ? 1 : scale_bytes(); }
  int64_t scale_bytes() const {
    return case_.scale_type == ScaleType::kF32 ? 4 : case_.scale_type == ScaleType::kF16 ? 2 : 1;
  }

  bool two_levels() const { return has_records(w_.offset); }
  int64_t records() const { return w_.panels() * w_.padded_inputs / kRecordInputs; }

  // Scales of both signs, subnormal ones, and multipliers of zero among all that there are.
  void fill_records(Random& random) {
    const size_t count = size_t(w_.out_features * w_.padded_inputs / kRecordInputs);
    std::vector<uint16_t> scales(count), offsets(count);
    std::vector<uint8_t> multipliers(size_t(w_.out_features * w_.groups) * 2);
    for (size_t i = 0; i < count; ++i) {
      scales[i] = to_half(random.normal() * (i % 7 == 3 ? 1e-7f : 1e-2f));
      offsets[i] = to_half(random.normal() * (i % 5 == 2 ? 0.f : 1e-1f));
    }
    for (auto& multiplier : multipliers) {
      multiplier = case_.data == Data::kExtremes ? uint8_t(255) : uint8_t(random.next() >> 9);
      if (!(random.next() >> 9 & 7)) multiplier = 0;
    }
    pack_records({scales.data(), offsets.data(), multipliers.data()}, w_, 0, w_.panels(), scales_.as<char>());
  }

  void fill() {
    Random random;
    const bool extreme = case_.data == Data::kExtremes;
    const int mask = code_mask(case_.type);
    std::vector<uint8_t> codes(size_t(w_.out_features * w_.in_features));
    for (auto& code : codes) code = uint8_t(extreme ? mask : int(random.next() >> 9) & mask);
    pack_codes(codes.data(), w_, 0, w_.panels(), codes_.as<uint8_t>());
    w_.codes = codes_.as<uint8_t>();
    const DType parameter = case_.scale_type == ScaleType::kF32 ? DType::kF32 : DType::kF16;
    if (two_levels()) fill_records(random);
    for (int64_t i = 0; !two_levels() && i < parameters_; ++i) {
      if (case_.scale_type == ScaleType::kE8M0) scales_.as<uint8_t>()[i] = uint8_t(110 + random.next() % 20);
      else store_element(scales_.as<char>(), parameter, i, random.normal() * 0.1f);
      if (w_.offset == Offset::kInteger)
        offsets_.as<uint8_t>()[i] = uint8_t(extreme ? mask : int(random.next() >> 9) & mask);
      if (w_.offset == Offset::kFloat) store_element(offsets_.as<char>(), parameter, i, random.normal());
    }
    w_.scales = scales_.as<char>();
    w_.offsets = takes_zero_point(w_.offset) || two_levels() ? nullptr : offsets_.as<char>();
    for (int64_t n = 0; n < w_.out_features; ++n) bias_.as<float>()[n] = random.normal();
    for (int64_t i = 0; i < case_.rows * w_.out_features; ++i) {
      store_element(residual_.as<char>(), case_.dtype, i, random.normal());
    }
    for (int64_t k = 0; k < w_.in_features; ++k) norm_weight_.as<float>()[k] = random.normal();
    for (int64_t k = 0; k < w_.in_features; ++k) norm_bias_.as<float>()[k] = random.normal();
    for (int64_t k = 0; k < w_.in_features; ++k) perm_.as<int64_t>()[k] = w_.in_features - 1 - k;
    for (int64_t row = 0; row < case_.rows; ++row) {
      for (int64_t k = 0; k < w_.in_features; ++k) {
        store_element(x_.as<char>(), case_.dtype, row * w_.in_features + k, element(case_, random, row, k));
      }
    }
  }

  Case case_;
  PackedWeight w_;
  int64_t parameters_, bytes_;
  Guarded codes_, scales_, offsets_, bias_, perm_, x_, norm_weight_, norm_bias_, residual_, y_;
};

}  // namespace
