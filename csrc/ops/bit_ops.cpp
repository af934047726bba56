// torch.ops.torch_int4.gather_bits: codes out of the blocks of files.
#include <vector>

#include "framework/bits.h"
#include "ops/tensors.h"

namespace torch_int4 {
namespace {

constexpr int64_t kFields = 6;  // of a run: first, count, byte, shift, width, left
constexpr int64_t kParallelCodes = 1 << 15;

BitRun check_run(const int64_t* given, int64_t size, int64_t codes) {
  const int64_t first = given[0], count = given[1], byte = given[2], shift = given[3], width = given[4],
                left = given[5];
  const bool inside = first >= 0 && count > 0 && byte >= 0 && first <= codes - count && byte <= size - count;
  const bool bits = shift >= 0 && width > 0 && left >= 0 && width <= 8 - shift && width <= 8 - left;
  STD_TORCH_CHECK(inside && bits, "torch_int4: the run (", first, ", ", count, ", ", byte, ", ", shift, ", ", width,
                  ", ", left, ") does not lie in blocks of ", size, " bytes and ", codes, " codes");
  return {first, count, byte, int(shift), int(left), uint8_t((1 << width) - 1)};
}

Tensor gather_bits_op(const Tensor& blocks, std::vector<int64_t> runs, int64_t codes) {
  STD_TORCH_CHECK(blocks.dim() == 3, "torch_int4: blocks must be [rows, blocks, bytes of a block]");
  const int64_t rows = blocks.size(0), each = blocks.size(1), size = blocks.size(2);
  check_tensor(blocks, "blocks", ScalarType::Byte, "uint8", {rows, each, size});
  STD_TORCH_CHECK(runs.size() % kFields == 0 && codes > 0, "torch_int4: a run has ", kFields,
                  " numbers, and a block at least one code");
  std::vector<BitRun> checked;
  for (size_t i = 0; i < runs.size(); i += kFields) checked.push_back(check_run(&runs[i], size, codes));
  Tensor target = torch::stable::new_empty(blocks, {rows, product(each, codes, "a row of codes")});
  const auto* from = static_cast<const uint8_t*>(blocks.const_data_ptr());
  auto* to = static_cast<uint8_t*>(target.mutable_data_ptr());
  torch::stable::parallel_for(0, rows * each, 1 + kParallelCodes / codes, [&](int64_t begin, int64_t end) {
    gather_bits(from + begin * size, end - begin, size, checked.data(), int64_t(checked.size()), codes,
                to + begin * codes);
  });
  return target;
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) { m.def("gather_bits(Tensor blocks, int[] runs, int codes) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CPU, m) { m.impl("gather_bits", TORCH_BOX(&gather_bits_op)); }

}  // namespace
}  // namespace torch_int4
