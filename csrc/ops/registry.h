// Arguments that were checked once, by the numbers that operators hand out for them.
#pragma once
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "ops/tensors.h"

namespace torch_int4 {

// Numbers start at 1. Whoever found a thing keeps it, also when it is removed meanwhile.
template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<const T> thing) {
    const std::lock_guard<std::mutex> guard(mutex_);
    things_[++last_] = std::move(thing);
    return last_;
  }

  std::shared_ptr<const T> find(int64_t number, const char* name) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = things_.find(number);
    STD_TORCH_CHECK(found != things_.end(), "torch_int4: there is no prepared ", name, " ", number);
    return found->second;
  }

  void remove(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    things_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const T>> things_;
  int64_t last_ = 0;
};

}  // namespace torch_int4
