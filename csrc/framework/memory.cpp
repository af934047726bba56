#include "framework/memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace torch_int4 {
namespace {

constexpr uintptr_t kPage = 4096;
constexpr size_t kWorthwhile = size_t(1) << 20;

bool wanted() {
  static const bool value = [] {
    const char* text = getenv("TORCH_INT4_HUGE_PAGES");
    return !text || strcmp(text, "0") != 0;
  }();
  return value;
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  if (bytes < kWorthwhile || !wanted()) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // The allocator may hand out reused memory in small pages; its contents are nobody's, so they are dropped first.
  // Neighbouring blocks are one mapping for the kernel, so a huge page may span two weights. Failure costs speed only.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace torch_int4
