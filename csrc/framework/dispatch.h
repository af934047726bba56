// Chooses a kernel set once, by what each one says of the processor and the operating system.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace torch_int4 {

// The kernel set in use. Throws std::runtime_error when TORCH_INT4_ISA names one that is unknown or unsupported.
const IsaKernels& active_kernels();

// Sets the kernel set by name ("" = the best supported one); throws like active_kernels().
void select_kernels(const std::string& name);

// In descending rank: every kernel set that was built, or only those that run here.
std::vector<const IsaKernels*> kernel_sets(bool only_supported);

// Their names.
std::vector<std::string> kernel_names(bool only_supported);

}  // namespace torch_int4
