// Shared by every file of operators: threads for the framework, and checks of tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "framework/linear.h"

namespace torch_int4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::string shape_text(const Tensor& t) { return shape_text({t.sizes().begin(), t.sizes().end()}); }

inline DType float_type(ScalarType type, const char* what) {
  if (type == ScalarType::Float) return DType::kF32;
  if (type == ScalarType::BFloat16) return DType::kBF16;
  STD_TORCH_CHECK(type == ScalarType::Half, "torch_int4: ", what, " must be float32, bfloat16 or float16");
  return DType::kF16;
}

// A product of sizes that a caller names.
inline int64_t product(int64_t a, int64_t b, const char* what) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), "torch_int4: ", what, " is too large: ", a, " times ", b);
  return result;
}

inline int64_t stored_bytes(const Tensor& t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

// That the storage reaches to an element so many behind the first one: it may have been resized under the tensor.
inline void check_stored(const Tensor& t, const char* name, int64_t distance) {
  int64_t last, bytes;
  const bool fits = !__builtin_add_overflow(t.storage_offset(), distance, &last) &&
                    !__builtin_mul_overflow(last + 1, int64_t(t.element_size()), &bytes) && bytes <= stored_bytes(t);
  STD_TORCH_CHECK(fits, "torch_int4: the storage of ", name, " ", shape_text(t),
                  " was resized and holds less than the tensor");
}

inline void check_stored(const Tensor& t, const char* name) {
  const int64_t count = t.numel();
  if (count == 0) return;
  if (t.is_contiguous()) return check_stored(t, name, count - 1);
  int64_t distance = 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) distance += product(sizes[i] - 1, strides[i], name);
  check_stored(t, name, distance);
}

inline void check_tensor(const Tensor& t, const char* name, ScalarType type, const char* type_name,
                         const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.is_cpu(), "torch_int4: ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == type, "torch_int4: ", name, " must be ", type_name);
  STD_TORCH_CHECK(t.is_contiguous(), "torch_int4: ", name, " must be contiguous");
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  STD_TORCH_CHECK(same, "torch_int4: ", name, " has shape ", shape_text(t), " but must be ", shape_text(shape));
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  if (count) check_stored(t, name, count - 1);
}

}  // namespace torch_int4
