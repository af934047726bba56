// Every kernel set that runs on this processor against the scalar reference, without torch: the same bits for the
// same operands, on odd shapes and extreme operands, with an unmapped page right before or right behind every buffer.
//
//   kernels_main [--small | --tiny | --dispatch] [--expect NAME]
// NAME is the kernel set that must be chosen by default; --dispatch checks nothing else.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "framework/dispatch.h"
#include "linear_problem.h"

namespace {

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

// Over all results of the reference, which are the same bits on every architecture; FNV-1a, where every NaN is alike.
uint64_t digest = 0xcbf29ce484222325u;

void digest_results(const std::vector<char>& y, DType dtype) {
  for (int64_t i = 0; i < int64_t(y.size()) / element_bytes(dtype); ++i) {
    const float x = load_element(y.data(), dtype, i);
    digest = (digest ^ (isnan(x) ? 0x7fc00000u : float_bits(x))) * 0x100000001b3u;
  }
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
    digest_results(expected, c.dtype);
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
  for (int turn = 0; turn < 6 * 3 * 2 * 6; ++turn) {
    const auto activation = Activation(turn % 6);
    const auto dtype = DType(turn / 6 % 3);
    const int64_t counts[] = {1, 15, 16, 17, 33, 100}, count = counts[turn / 36];
    Guarded a(size_t(count) * 4, turn / 18 % 2), b(size_t(count) * 4, turn / 18 % 2);
    std::vector<float> expected;
    for (const auto& set : kernel_names(true)) {
      select_kernels(set);
      Random random;
      for (int64_t i = 0; i < count; ++i) {
        a.as<float>()[i] = round_to(dtype, random.normal() * (i % 5 == 4 ? 40.f : 2.f));
        b.as<float>()[i] = round_to(dtype, random.normal() * (i % 4 == 3 ? 9.f : 1.f));
      }
      if (count > 15) a.as<float>()[14] = NAN;
      const bool alone = turn % 7 == 6 && activation != Activation::kClampedSwiglu;
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
        printf("FAILED %s: gate of %d, activation %d, dtype %d\n", set.c_str(), int(count), turn % 6, int(dtype));
    }
  }
}

constexpr int kTypes = int(sizeof kTypeFacts / sizeof *kTypeFacts);

enum class Size { kAll, kSmall, kTiny, kNone };

// Scales, and offsets, of two levels, which have whole records.
void two_level_cases(const std::vector<int64_t>& rows, bool small, std::vector<Case>& all) {
  const int64_t sizes[][2] = {{1, 256}, {33, 512}, {16, 768}, {100, 1280}};
  int turn = 0;
  for (int pair = 0; pair < kTypes * 3; ++pair) {
    const auto type = WeightType(pair / 3);
    const auto offset = Offset(int(Offset::kTwoLevel) + pair % 3);
    if (!are_served(type, offset)) continue;
    for (int compute = 0; compute < 4; ++compute) {
      for (int data = 0; data < 3; ++data) {
        for (int repeat = 0; repeat < (small ? 1 : 4); ++repeat, ++turn) {
          const auto* size = sizes[turn % (small ? 3 : 4)];
          const bool random = Data(data) == Data::kRandom;
          all.push_back({random ? rows[size_t(turn * 5) % rows.size()] : compute + 4, size[0], size[1],
                         offset == Offset::kTwoLevelHalves ? kHalf : kSlab, type, offset, Compute(compute),
                         random ? DType(turn % 3) : DType::kF32, Data(data), ScaleType::kF16, turn % 5 == 4, turn % 4,
                         turn % 7 < 3});
        }
      }
    }
  }
}

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
    for (int type = 0; type < kTypes; ++type) {
      if (high_bits(WeightType(type)) && group != 32 && group != 128 && group != -1) continue;
      for (int offset = 0; offset <= int(Offset::kFloat); ++offset) {
        if (!are_served(WeightType(type), Offset(offset))) continue;
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
  two_level_cases(rows, small, all);
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
  printf("digest of the reference: %016llx\n", static_cast<unsigned long long>(digest));
  printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
