// The one place that decides where the intrinsics of x86-64 come from. Kernel files include it before their target
// region, and define nothing where it leaves TI4_X86 undefined.
// With TORCH_INT4_EMULATE the same sources compile for an AVX2 processor, and tests/native/emulated/ (found through -I)
// supplies every instruction set above it.
#pragma once
#include "kernels/cpu_x86.h"
#include "kernels/simd.h"

#ifdef TI4_X86
#ifdef TORCH_INT4_EMULATE
#include "emulated/simd.h"
#define TI4_TARGET(features) TI4_PRAGMA(GCC target("avx2,fma,f16c"))
#define TI4_KEEP(x) ((void)0)  // no register holds an emulated vector
#else
#include <immintrin.h>
// The instruction sets of the functions that follow, up to `#pragma GCC pop_options`.
#define TI4_TARGET(features) TI4_PRAGMA(GCC target(features))
// Keeps gcc from reassociating a chain of integer additions, which spills the accumulators of a tile.
#define TI4_KEEP(x) __asm__("" : "+x"(x))
#endif
#endif
