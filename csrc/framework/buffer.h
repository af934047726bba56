// Scratch memory of the framework loops.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <memory>
#include <new>

namespace torch_int4 {

constexpr size_t kKeptBytes = size_t(32) << 20;  // most that a thread keeps of one buffer between calls

// Memory that a thread keeps between calls, cache-line aligned; given back when it is unusually large.
class Buffer {
 public:
  template <class T>
  T* get(int64_t count) {
    constexpr int64_t kMost = int64_t(1) << 56;  // of elements; more is arithmetic that went wrong
    if (count < 0 || count > kMost) throw std::bad_alloc();
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > capacity_) {
      data_.reset();
      capacity_ = (bytes + 4095) / 4096 * 4096;
      data_.reset(aligned_alloc(64, capacity_));
      if (!data_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(data_.get());
  }
  void trim(size_t limit) {
    if (capacity_ > limit) data_.reset(), capacity_ = 0;
  }

 private:
  struct Free {
    void operator()(void* p) const { free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace torch_int4
