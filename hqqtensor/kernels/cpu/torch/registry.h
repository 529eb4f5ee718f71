// Objects that Python holds by a number: it is given out when one is added, and freed by an operator of its own.
#pragma once
#include <map>
#include <memory>
#include <mutex>

#include "torch/error.h"

namespace hqqtensor {

template <class T>
class Registry {
 public:
  // kind: what an error calls the objects.
  explicit Registry(const char* kind) : kind_(kind) {}

  int64_t add(std::shared_ptr<T> object) {
    const std::lock_guard<std::mutex> hold(lock_);
    by_id_.emplace(next_, std::move(object));
    return next_++;
  }
  std::shared_ptr<T> find(int64_t id) {
    const std::lock_guard<std::mutex> hold(lock_);
    const auto found = by_id_.find(id);
    HQQ_CHECK(found != by_id_.end(), "there is no ", kind_, " ", id);
    return found->second;
  }
  // Nothing where there is none of that number: it may be the second time.
  void remove(int64_t id) {
    std::shared_ptr<T> last;  // freed without the lock
    const std::lock_guard<std::mutex> hold(lock_);
    const auto found = by_id_.find(id);
    if (found == by_id_.end()) return;
    last = std::move(found->second);
    by_id_.erase(found);
  }

 private:
  const char* kind_;
  std::mutex lock_;
  std::map<int64_t, std::shared_ptr<T>> by_id_;
  int64_t next_ = 1;
};

}  // namespace hqqtensor
