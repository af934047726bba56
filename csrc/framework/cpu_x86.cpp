#include "kernels/cpu_x86.h"

#ifdef TI4_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace torch_int4 {
namespace x86 {
namespace {

#ifdef TORCH_INT4_EMULATE
constexpr bool kEmulated = true;  // tests/native/emulated/ supplies all instruction sets
#else
constexpr bool kEmulated = false;
#endif

}  // namespace

bool cpuid(uint32_t leaf, uint32_t subleaf, Register where, int bit) {
  if (kEmulated) return true;
  unsigned r[4];
  if (!__get_cpuid_count(leaf, 0, r, r + 1, r + 2, r + 3)) return false;
  if (leaf == 7 && subleaf > r[0]) return false;  // the leaf that says how many sub-leaves it has
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  return (r[where] >> bit) & 1;
}

bool saves(uint64_t state) {
  if (kEmulated) return true;
  if (!cpuid(1, 0, kEcx, 27)) return false;  // OSXSAVE: whether there is an XCR0 to read
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (((uint64_t(high) << 32) | low) & state) == state;
}

bool request(int component) {
  if (kEmulated) return true;
  constexpr int kArchReqXcompPerm = 0x1023;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, component) == 0;
}

}  // namespace x86
}  // namespace torch_int4
#endif
