// The limits of a kernel set's instructions: loops that the bench measures beside the operators and compares them with.
// Included by kernels: no ATen, no STL.
#pragma once
#include <stdint.h>

namespace torch_int4 {

struct Probe {
  const char* name;  // in two kernel sets the same for the same loop, which is measured once
  void (*run)(int64_t iterations);
  int operations;  // of one iteration: multiplications and additions; of the probe "issue", instructions
};

struct Probes {
  // The bounds of products of 4-bit weights in int8, in bfloat16, and in float; a loop without a name bounds none.
  Probe int8, bf16, fp32;
  // Other loops worth measuring, up to the first without a name. The lowest vector set of an architecture has "issue":
  // instructions that need no unit, whose rate halves on a core that another thread shares.
  Probe others[4];
  // Reads [p, p + bytes) as `streams` sequences far apart, `prefetch` bytes ahead (0: not at all); bytes is a multiple
  // of 256 * streams. Null where a lower set of the architecture reads as fast.
  void (*read)(const char* p, int64_t bytes, int64_t streams, int64_t prefetch);
};

}  // namespace torch_int4
