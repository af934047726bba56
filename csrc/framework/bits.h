// Codes out of the blocks of files, which keep the bits of a code in several places.
#pragma once
#include <stdint.h>

namespace torch_int4 {

// Of `count` bytes of a block from `byte` on, the bits of `mask` above `shift` are bits of as many codes from `first`
// on, those above `left`.
struct BitRun {
  int64_t first, count, byte;
  int shift, left;
  uint8_t mask;
};

// Blocks of `size` bytes become `codes` bytes each; bits that no run gives are zero.
void gather_bits(const uint8_t* blocks, int64_t count, int64_t size, const BitRun* runs, int64_t number, int64_t codes,
                 uint8_t* target);

}  // namespace torch_int4
