// Helpers that vector kernels and their loops need from the compiler on every architecture. simd_<architecture>.h adds
// intrinsics. TORCH_INT4_EMULATE compiles the kernels of an architecture for a processor that lacks most of their
// instructions.
#pragma once

#define TI4_PRAGMA(text) _Pragma(#text)

#ifdef TORCH_INT4_EMULATE
#define TI4_INLINE inline  // copies of everything in every loop would compile for minutes
#define TI4_FORGET(p) ((void)0)
#define TI4_BARRIER() ((void)0)
#else
#define TI4_INLINE inline __attribute__((always_inline))
// Keeps gcc from knowing where a pointer points, so that it loads values again instead of keeping them in registers
// that it lacks.
#define TI4_FORGET(p) __asm__("" : "+r"(p))
// Keeps gcc from moving loads and stores across.
#define TI4_BARRIER() __asm__ volatile("" ::: "memory")
#endif
