// The questions of kernel files to an x86-64 processor and to Linux; framework/cpu_x86.cpp answers. A kernel file names
// flags of its own instructions, as the manuals do, so that a new one needs no line here. Included outside of target
// regions: every processor runs the questions.
#pragma once
#include <stdint.h>

// TORCH_INT4_PORTABLE leaves out the kernels of every architecture.
#if defined(__x86_64__) && !defined(TORCH_INT4_PORTABLE)
#define TI4_X86

namespace torch_int4 {
namespace x86 {

enum Register : int { kEax, kEbx, kEcx, kEdx };

// A bit of a register after CPUID with this leaf and sub-leaf; false where the processor has no such leaf.
bool cpuid(uint32_t leaf, uint32_t subleaf, Register where, int bit);

// Whether Linux saves all of these parts of a thread's state, which are bits of XCR0.
bool saves(uint64_t state);
constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

// Whether this process may use a part of the state, by its bit in XCR0, that Linux hands out only on request. Asking is
// the request.
bool request(int component);
constexpr int kTileData = 18;

// Features that several kernel sets build on.
namespace {

inline bool has_avx2() {
  return saves(kYmm) && cpuid(1, 0, kEcx, 12) && cpuid(1, 0, kEcx, 29) && cpuid(7, 0, kEbx, 5);  // FMA, F16C, AVX2
}

inline bool has_avx512() {
  return has_avx2() && saves(kZmm) && cpuid(7, 0, kEbx, 16) && cpuid(7, 0, kEbx, 17) && cpuid(7, 0, kEbx, 30) &&
         cpuid(7, 0, kEbx, 31);  // F, DQ, BW, VL
}

inline bool has_avx512_vnni() { return has_avx512() && cpuid(7, 0, kEcx, 11); }

}  // namespace
}  // namespace x86
}  // namespace torch_int4
#endif
