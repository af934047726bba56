// The one place that decides where intrinsics come from. Kernel files include it before their target region.
// With TORCH_INT4_EMULATE the same sources compile for an AVX2 processor, and tests/native/emulated/ (found through -I)
// supplies every instruction set above it.
#pragma once

#define TI4_PRAGMA(text) _Pragma(#text)

#ifdef TORCH_INT4_EMULATE
#include "emulated/simd.h"
#define TI4_TARGET(features) TI4_PRAGMA(GCC target("avx2,fma,f16c"))
#define TI4_INLINE inline      // copies of everything in every loop would compile for minutes
#define TI4_KEEP(x) ((void)0)  // no register holds an emulated vector
#define TI4_FORGET(p) ((void)0)
#define TI4_BARRIER() ((void)0)
#else
#include <immintrin.h>
// The instruction sets of the functions that follow, up to `#pragma GCC pop_options`.
#define TI4_TARGET(features) TI4_PRAGMA(GCC target(features))
#define TI4_INLINE inline __attribute__((always_inline))
// Keeps gcc from reassociating a chain of integer additions, which spills the accumulators of a tile.
#define TI4_KEEP(x) __asm__("" : "+x"(x))
// Keeps gcc from knowing where a pointer points, so that it loads again what it would keep in registers that it lacks.
#define TI4_FORGET(p) __asm__("" : "+r"(p))
// Keeps gcc from moving loads and stores across.
#define TI4_BARRIER() __asm__ volatile("" ::: "memory")
#endif
