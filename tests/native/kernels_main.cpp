// Every kernel set that runs on this processor against the scalar reference, without torch: the same bits for the
// same operands, on odd shapes and extreme operands, with an unmapped page right before or right behind every buffer.
//
//   kernels_main [--small | --tiny | --dispatch] [--expect NAME]
// NAME is the kernel set that must be chosen by default; --dispatch checks nothing else.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "framework/codebooks.h"
#include "framework/dispatch.h"
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
        scales_(size_t(parameters_ * scale_bytes()), at_end),
        offsets_(size_t(parameters_ * offset_bytes()), at_end),
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

  void fill() {
    Random random;
    const bool extreme = case_.data == Data::kExtremes;
    const int mask = case_.type == WeightType::kInt8 ? 255 : 15;
    std::vector<uint8_t> codes(size_t(w_.out_features * w_.in_features));
    for (auto& code : codes) code = uint8_t(extreme ? mask : int(random.next() >> 9) & mask);
    pack_codes(codes.data(), w_, 0, w_.panels(), codes_.as<uint8_t>());
    w_.codes = codes_.as<uint8_t>();
    const DType parameter = case_.scale_type == ScaleType::kF32 ? DType::kF32 : DType::kF16;
    for (int64_t i = 0; i < parameters_; ++i) {
      if (case_.scale_type == ScaleType::kE8M0) scales_.as<uint8_t>()[i] = uint8_t(110 + random.next() % 20);
      else store_element(scales_.as<char>(), parameter, i, random.normal() * 0.1f);
      if (w_.offset == Offset::kInteger)
        offsets_.as<uint8_t>()[i] = uint8_t(extreme ? mask : int(random.next() >> 9) & mask);
      if (w_.offset == Offset::kFloat) store_element(offsets_.as<char>(), parameter, i, random.normal());
    }
    w_.scales = scales_.as<char>();
    w_.offsets = w_.offset == Offset::kSymmetric ? nullptr : offsets_.as<char>();
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

// NaN payloads may differ between instruction sets; everything else must not.
bool same(const std::vector<char>& a, const std::vector<char>& b, DType dtype, bool exact) {
  const int64_t count = int64_t(a.size()) / element_bytes(dtype);
  double error = 0, norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float p = load_element(a.data(), dtype, i), q = load_element(b.data(), dtype, i);
    if (isnan(p) || isnan(q) || isinf(p) || isinf(q)) {
      if (isnan(p) != isnan(q) || isinf(p) != isinf(q)) return false;
      continue;
    }
    if (exact && float_bits(p) != float_bits(q)) return false;
    error += double(p - q) * (p - q);
    norm += double(q) * q;
  }
  return sqrt(error) <= 1e-2 * sqrt(norm) + 1e-30;
}

int failures = 0, passed = 0;

void check(bool ok, const char* what, const char* kernels, const Case& c) {
  ok ? ++passed : ++failures;
  if (!ok && failures < 20) printf("FAILED %s: %s %s\n", kernels, what, describe(c).c_str());
}

void run_case(const Case& c, const std::vector<std::string>& sets) {
  for (int at_end = 0; at_end < 2; ++at_end) {
    Problem problem(c, at_end);
    select_kernels("reference");
    const std::vector<char> expected = problem.run(0, c.rows);
    for (const auto& set : sets) {
      select_kernels(set);
      const std::vector<char> all = problem.run(0, c.rows);
      check(same(all, expected, c.dtype, c.compute != Compute::kBf16), "differs from the reference", set.c_str(), c);
      if (c.rows == 1 || at_end) continue;
      const int64_t last = c.rows - 1;
      const std::vector<char> alone = problem.run(last, 1);
      const std::vector<char> in_batch(all.begin() + int64_t(size_t(last) * problem.row_bytes()), all.end());
      check(same(alone, in_batch, c.dtype, c.compute != Compute::kBf16), "a row alone differs from the row in a batch",
            set.c_str(), c);
    }
  }
}

// act(gate) * up against the reference, whose exponentials are those of the C library.
void run_gates() {
  for (int turn = 0; turn < 3 * 3 * 2 * 6; ++turn) {
    const auto activation = Activation(turn % 3);
    const auto dtype = DType(turn / 3 % 3);
    const int64_t counts[] = {1, 15, 16, 17, 33, 100}, count = counts[turn / 18];
    Guarded a(size_t(count) * 4, turn / 9 % 2), b(size_t(count) * 4, turn / 9 % 2);
    std::vector<float> expected;
    for (const auto& set : kernel_names(true)) {
      select_kernels(set);
      Random random;
      for (int64_t i = 0; i < count; ++i) {
        a.as<float>()[i] = round_to(dtype, random.normal() * (i % 5 == 4 ? 40.f : 2.f));
        b.as<float>()[i] = round_to(dtype, random.normal());
      }
      if (count > 15) a.as<float>()[14] = NAN;
      const bool alone = turn % 7 == 6;
      active_kernels().gate(a.as<float>(), alone ? nullptr : b.as<float>(), count, activation, dtype);
      const float* y = a.as<float>();
      if (expected.empty()) expected.assign(y, y + count);
      bool ok = true;
      const float step = dtype == DType::kF32 ? 1e-6f : dtype == DType::kF16 ? 2e-3f : 2e-2f;
      for (int64_t i = 0; i < count; ++i) {
        const bool both_nan = isnan(y[i]) && isnan(expected[size_t(i)]);
        ok = ok && (both_nan || fabsf(y[i] - expected[size_t(i)]) <= step * (1.f + fabsf(expected[size_t(i)])));
      }
      ok ? ++passed : ++failures;
      if (!ok)
        printf("FAILED %s: gate of %d, activation %d, dtype %d\n", set.c_str(), int(count), turn % 3, int(dtype));
    }
  }
}

enum class Size { kAll, kSmall, kTiny, kNone };

std::vector<Case> cases(Size extent) {
  std::vector<Case> all;
  const bool small = extent != Size::kAll;
  const std::vector<int64_t> rows =
      small ? std::vector<int64_t>{1, 2, 5, 17}
            : std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 64, 129, 140};
  const std::vector<int64_t> groups = {32, 64, 96, 128, 256, 1024, -1};
  const int64_t sizes[][2] = {{1, 1}, {15, 31}, {16, 32}, {17, 33}, {31, 300}, {65, 129}, {100, 576}, {129, 255}};
  int turn = 0;
  for (int64_t group : groups) {
    for (int type = 0; type < 3; ++type) {
      for (int offset = 0; offset < (type == 2 ? 1 : 3); ++offset) {
        const bool can_be_e8m0 = Offset(offset) != Offset::kFloat;
        for (int compute = 0; compute < 4; ++compute) {
          for (int repeat = 0; repeat < (small ? 1 : 4); ++repeat, ++turn) {
            const auto* size = sizes[size_t(turn) % (small ? 6 : 8)];
            all.push_back({rows[size_t(turn * 7 + turn / 17) % rows.size()], size[0], size[1], group, WeightType(type),
                           Offset(offset), Compute(compute), DType(turn % 3), Data::kRandom,
                           ScaleType(turn % (can_be_e8m0 ? 3 : 2)), turn % 5 == 4, turn % 4, turn % 7 < 3});
          }
          all.push_back({compute + 4, 33, 160, group, WeightType(type), Offset(offset), Compute(compute), DType::kF32,
                         Data::kNotFinite, ScaleType::kF16, false, turn % 4, compute % 2 == 1});
          all.push_back({1 + turn % 6, 48, 1100, group, WeightType(type), Offset(offset), Compute(compute), DType::kF32,
                         Data::kExtremes, ScaleType::kF16, false, turn % 4, compute % 2 == 0});
        }
      }
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  Size extent = Size::kAll;
  std::string expected;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--small")) extent = Size::kSmall;
    else if (!strcmp(argv[i], "--tiny")) extent = Size::kTiny;
    else if (!strcmp(argv[i], "--dispatch")) extent = Size::kNone;
    else if (!strcmp(argv[i], "--expect") && i + 1 < argc) expected = argv[++i];
  }
  const std::string chosen = active_kernels().name;
  printf("kernels chosen: %s; run here:", chosen.c_str());
  const std::vector<std::string> sets = kernel_names(true);
  for (const auto& name : sets) printf(" %s", name.c_str());
  printf("\n");
  if (!expected.empty() && chosen != expected) {
    printf("FAILED: expected the kernel set %s\n", expected.c_str());
    return 1;
  }
  if (extent == Size::kNone) return 0;
  int turn = 0;
  for (const Case& c : cases(extent)) {
    if (extent != Size::kTiny || turn++ % 5 == 0) run_case(c, sets);
  }
  run_gates();
  printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
