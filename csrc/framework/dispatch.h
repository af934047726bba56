// Chooses a kernel set once, by what the processor and the operating system support.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace torch_int4 {

CpuFeatures detect_cpu();

// The kernel set in use. Throws std::runtime_error when TORCH_INT4_ISA names one that is unknown or unsupported.
const IsaKernels& active_kernels();

// Sets the kernel set by name ("" = the best supported one); throws like active_kernels().
void select_kernels(const std::string& name);

// Names in descending rank: every kernel set that was built, or only those that run here.
std::vector<std::string> kernel_names(bool only_supported);

}  // namespace torch_int4
