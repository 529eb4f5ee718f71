// One piece of memory for many tensors, in huge pages if the system gives them: weights of less than such a page would lie in
// small ones, whose addresses cost more to look up than their codes to multiply.
#include <algorithm>
#include <memory>
#include <mutex>

#include "dispatch/pages.h"
#include "torch/operators.h"
#include "torch/registry.h"

namespace hqqtensor {
namespace {

struct Memory {
  explicit Memory(size_t bytes) : data((char*)allocate(bytes)), size(bytes) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { hqqtensor::release(data, size); }
  char* data;
  size_t size, used = 0;
  std::mutex lock;
};

Registry<Memory>& arenas() {
  static auto* const all = new Registry<Memory>("arena");  // outlives all tensors: these may be freed when the process ends
  return *all;
}

}  // namespace

bool arena_new(Call& c) {
  const int64_t bytes = c.integer();
  HQQ_CHECK(bytes >= 1 && bytes <= (int64_t)1 << 46, "an arena must have 1 to 2^46 bytes, got ", bytes);
  c.give(arenas().add(std::make_shared<Memory>((size_t)bytes)));
  return true;
}

bool arena_take(Call& c) {
  const int64_t id = c.integer(), bytes = c.integer();
  const std::shared_ptr<Memory> owner = arenas().find(id);
  Memory& memory = *owner;
  const std::lock_guard<std::mutex> hold(memory.lock);
  HQQ_CHECK(bytes >= 0 && (size_t)bytes <= memory.size - memory.used, "an arena of ", (int64_t)memory.size, " bytes, of which ",
            (int64_t)memory.used, " are taken, has no ", bytes, " more");
  char* const data = memory.data + memory.used;
  memory.used = std::min(memory.size, memory.used + ((size_t)bytes + 63) / 64 * 64);
  const auto done = [](void*, void* context) { delete (std::shared_ptr<Memory>*)context; };
  c.give(from_blob(data, Sizes{&bytes, 1}, Scalar::uint8, done, new std::shared_ptr<Memory>(owner)));
  return true;
}

bool arena_delete(Call& c) {
  arenas().remove(c.integer());
  return true;
}

}  // namespace hqqtensor
