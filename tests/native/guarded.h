// Operands for the native tests: memory between unmapped pages, and numbers that every run repeats.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <stdexcept>

namespace {

constexpr size_t kPage = 4096;

// Memory that faults one byte before its beginning or one byte behind its end.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) : length_((bytes + kPage - 1) / kPage * kPage + 2 * kPage) {
    void* map = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::runtime_error("mmap failed");
    base_ = static_cast<char*>(map);
    mprotect(base_, kPage, PROT_NONE);
    mprotect(base_ + length_ - kPage, kPage, PROT_NONE);
    data_ = at_end ? base_ + length_ - kPage - bytes : base_ + kPage;
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t length_;
  char* base_;
  char* data_;
};

struct Random {
  uint32_t state = 2463534242u;
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
  }
  float normal() { return (float(next() & 0xffff) + float(next() & 0xffff) - 65535.f) / 30000.f; }
};

}  // namespace
