// The processor's limits: operators by which the bench measures the probes of kernel sets, in the same run as the
// operators that they bound. Every probe runs once on each thread of torch's pool.
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <chrono>
#include <string>
#include <tuple>
#include <vector>

#include "framework/dispatch.h"
#include "kernels/probe.h"

namespace torch_int4 {
namespace {

using torch::stable::Tensor;

// The probes of all kernel sets that run here, each once, those of the lowest set first.
std::vector<Probe> probes_here() {
  std::vector<Probe> found;
  const auto add = [&found](const Probe& probe) {
    if (!probe.name) return;
    for (const Probe& other : found) {
      if (!strcmp(probe.name, other.name)) return;
    }
    found.push_back(probe);
  };
  const std::vector<const IsaKernels*> sets = kernel_sets(true);
  for (auto set = sets.rbegin(); set != sets.rend(); ++set) {
    const Probes* probes = (*set)->probes;
    if (!probes) continue;
    for (const Probe& probe : {probes->fp32, probes->bf16, probes->int8}) add(probe);
    for (const Probe& probe : probes->others) add(probe);
  }
  return found;
}

template <class Body>
double seconds_of(int64_t count, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, count, 1, body);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string probe_names() {
  std::string text;
  for (const Probe& probe : probes_here()) text += (text.empty() ? "" : ",") + std::string(probe.name);
  return text;
}

// The probe that bounds the products of a kernel set, which need not run here; "" where it has none or was not built.
std::string probe_roof(std::string isa, std::string compute) {
  STD_TORCH_CHECK(compute == "int8" || compute == "bf16" || compute == "fp32",
                  "torch_int4: compute must be int8, bf16 or fp32, not '", compute, "'");
  for (const IsaKernels* set : kernel_sets(false)) {
    if (isa != set->name || !set->probes) continue;
    const Probes& probes = *set->probes;
    const char* name = (compute == "int8" ? probes.int8 : compute == "bf16" ? probes.bf16 : probes.fp32).name;
    return name ? name : "";
  }
  return "";
}

// (seconds, operations of all threads together)
std::tuple<double, double> probe_compute(std::string name, int64_t iterations) {
  STD_TORCH_CHECK(iterations > 0, "torch_int4: iterations must be positive");
  for (const Probe& probe : probes_here()) {
    if (name != probe.name) continue;
    const int64_t threads = torch::stable::get_num_threads();
    const double seconds = seconds_of(threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) probe.run(iterations);
    });
    return {seconds, double(threads) * double(iterations) * probe.operations};
  }
  STD_TORCH_CHECK(false, "torch_int4: no probe '", name, "' runs here; there are ", probe_names());
  return {};
}

// Seconds to read a whole buffer, every thread its own range, by the best kernel set that has a way of its own.
double probe_read(const Tensor& buffer, int64_t streams, int64_t prefetch) {
  const int64_t threads = torch::stable::get_num_threads(), bytes = buffer.numel() * int64_t(buffer.element_size());
  decltype(Probes::read) read = nullptr;
  for (const IsaKernels* set : kernel_sets(true)) {
    if (!read && set->probes) read = set->probes->read;
  }
  STD_TORCH_CHECK(read, "torch_int4: no kernel set that runs here has a probe of reading");
  STD_TORCH_CHECK(buffer.is_cpu() && buffer.is_contiguous(), "torch_int4: buffer must be a contiguous CPU tensor");
  STD_TORCH_CHECK(streams > 0 && prefetch >= 0, "torch_int4: streams must be positive, prefetch not negative");
  STD_TORCH_CHECK(bytes > 0 && bytes % (threads * streams * 256) == 0,
                  "torch_int4: buffer must be a multiple of threads * streams * 256 bytes long");
  const char* data = static_cast<const char*>(buffer.const_data_ptr());
  const int64_t part = bytes / threads;
  return seconds_of(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read(data + i * part, part, streams, prefetch);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def("probe_names() -> str");
  m.def("probe_roof(str isa, str compute) -> str");
  m.def("probe_compute(str name, int iterations) -> (float, float)");
  m.def("probe_read(Tensor buffer, int streams, int prefetch) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("probe_names", TORCH_BOX(&probe_names));
  m.impl("probe_roof", TORCH_BOX(&probe_roof));
  m.impl("probe_compute", TORCH_BOX(&probe_compute));
  m.impl("probe_read", TORCH_BOX(&probe_read));
}

}  // namespace
}  // namespace torch_int4
