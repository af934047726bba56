#include "framework/bits.h"

#include <string.h>

namespace torch_int4 {
namespace {

constexpr uint64_t kEachByte = 0x0101010101010101;

// Eight codes at a time: what a shift moves from one byte into the next one is masked out, and masked bits stay inside.
void gather(const uint8_t* from, const BitRun& run, uint8_t* to) {
  const uint64_t mask = run.mask * kEachByte;
  int64_t i = 0;
  for (; i + 8 <= run.count; i += 8) {
    uint64_t bytes, codes;
    memcpy(&bytes, from + i, 8);
    memcpy(&codes, to + i, 8);
    codes |= ((bytes >> run.shift) & mask) << run.left;
    memcpy(to + i, &codes, 8);
  }
  for (; i < run.count; ++i) to[i] = uint8_t(to[i] | ((from[i] >> run.shift) & run.mask) << run.left);
}

}  // namespace

void gather_bits(const uint8_t* blocks, int64_t count, int64_t size, const BitRun* runs, int64_t number, int64_t codes,
                 uint8_t* target) {
  for (int64_t block = 0; block < count; ++block, blocks += size, target += codes) {
    memset(target, 0, size_t(codes));
    for (int64_t i = 0; i < number; ++i) gather(blocks + runs[i].byte, runs[i], target + runs[i].first);
  }
}

}  // namespace torch_int4
