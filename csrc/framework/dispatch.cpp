#include "framework/dispatch.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace torch_int4 {
namespace {

// Zero-initialised before any static initialiser runs, so kernel files may register in any order.
IsaKernels* registered = nullptr;
std::atomic<const IsaKernels*> active{nullptr};

struct Candidate {
  const IsaKernels* kernels;
  bool supported;
};

// In descending rank. Every set is asked once: its questions may be requests to the operating system, and where the
// processor is virtual, the host answers them slowly.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
    for (IsaKernels* kernels = registered; kernels; kernels = kernels->next) {
      found.push_back({kernels, kernels->supported()});
    }
    const auto above = [](const Candidate& a, const Candidate& b) { return a.kernels->rank > b.kernels->rank; };
    std::sort(found.begin(), found.end(), above);
    return found;
  }();
  return all;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const IsaKernels* find(const std::string& name) {
  bool known = false;
  for (const Candidate& candidate : candidates()) {
    if (!name.empty() && name != candidate.kernels->name) continue;
    if (candidate.supported) return candidate.kernels;
    known = true;
  }
  throw std::runtime_error("TORCH_INT4_ISA=" + name + (known ? " is not supported by this processor" : " is unknown") +
                           "; kernels that run here: " + join(kernel_names(true)) +
                           "; kernels that were built: " + join(kernel_names(false)));
}

}  // namespace

bool register_kernels(IsaKernels* kernels) {
  kernels->next = registered;
  registered = kernels;
  return true;
}

std::vector<const IsaKernels*> kernel_sets(bool only_supported) {
  std::vector<const IsaKernels*> sets;
  for (const Candidate& candidate : candidates()) {
    if (!only_supported || candidate.supported) sets.push_back(candidate.kernels);
  }
  return sets;
}

std::vector<std::string> kernel_names(bool only_supported) {
  std::vector<std::string> names;
  for (const IsaKernels* kernels : kernel_sets(only_supported)) names.push_back(kernels->name);
  return names;
}

void select_kernels(const std::string& name) { active.store(find(name)); }

const IsaKernels& active_kernels() {
  const IsaKernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) {
    const char* forced = getenv("TORCH_INT4_ISA");
    kernels = find(forced ? forced : "");
    active.store(kernels);
  }
  return *kernels;
}

}  // namespace torch_int4
