#include "framework/dispatch.h"

#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace torch_int4 {
namespace {

// Zero-initialised before any static initialiser runs, so kernel files may register in any order.
IsaKernels* registered = nullptr;
std::atomic<const IsaKernels*> active{nullptr};

bool bit(unsigned word, int index) { return (word >> index) & 1; }

uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to a process that asked for it.
bool amx_permitted() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

std::vector<IsaKernels*> by_rank() {
  std::vector<IsaKernels*> all;
  for (IsaKernels* kernels = registered; kernels; kernels = kernels->next) all.push_back(kernels);
  std::sort(all.begin(), all.end(), [](auto* a, auto* b) { return a->rank > b->rank; });
  return all;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const IsaKernels* find(const std::string& name) {
  static const CpuFeatures cpu = detect_cpu();
  bool known = false;
  for (IsaKernels* kernels : by_rank()) {
    if (!name.empty() && name != kernels->name) continue;
    if (kernels->supported(cpu)) return kernels;
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

CpuFeatures detect_cpu() {
#ifdef TORCH_INT4_EMULATE  // tests/native/emulated/ supplies all instruction sets
  return {true, true, true, true, true, true, true, true};
#endif
  CpuFeatures cpu{};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), f16c = bit(c, 29);
  if (!osxsave || !fma || !f16c) return cpu;
  unsigned b7, c7, d7, a71 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return cpu;
  if (a >= 1 && __get_cpuid_count(7, 1, &a71, &b, &c, &d) == 0) a71 = 0;
  const uint64_t state = xcr0();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  cpu.avx2 = (state & kYmm) == kYmm && bit(b7, 5);
  cpu.avx_vnni = cpu.avx2 && bit(a71, 4);
  cpu.avx512 = cpu.avx2 && (state & kZmm) == kZmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);
  cpu.avx512_vnni = cpu.avx512 && bit(c7, 11);
  cpu.avx512_bf16 = cpu.avx512 && bit(a71, 5);
  cpu.amx_tile = cpu.avx512_vnni && (state & kTiles) == kTiles && bit(d7, 24) && amx_permitted();
  cpu.amx_int8 = cpu.amx_tile && bit(d7, 25);
  cpu.amx_bf16 = cpu.amx_tile && bit(d7, 22);
  return cpu;
}

std::vector<std::string> kernel_names(bool only_supported) {
  const CpuFeatures cpu = detect_cpu();
  std::vector<std::string> names;
  for (IsaKernels* kernels : by_rank()) {
    if (!only_supported || kernels->supported(cpu)) names.push_back(kernels->name);
  }
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
