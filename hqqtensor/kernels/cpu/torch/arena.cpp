// One piece of memory for many tensors, in huge pages if the system gives them: weights of less than such a page would lie in
// small ones, whose addresses cost more to look up than their codes to multiply.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "dispatch/pages.h"
#include "torch/operators.h"

namespace hqqtensor {
namespace {

struct Memory {
  explicit Memory(size_t bytes) : data((char*)allocate(bytes)), size(bytes) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { hqqtensor::release(data, size); }
  char* data;
  size_t size, used = 0;
};

struct Arenas {
  std::mutex lock;
  std::map<int64_t, std::shared_ptr<Memory>> by_id;
  int64_t next = 1;
};

Arenas& arenas() {
  static auto* const all = new Arenas();  // outlives all tensors: these may be freed when the process ends
  return *all;
}

}  // namespace

bool arena_new(Call& c) {
  const int64_t bytes = c.integer();
  HQQ_CHECK(bytes >= 1 && bytes <= (int64_t)1 << 46, "an arena must have 1 to 2^46 bytes, got ", bytes);
  auto memory = std::make_shared<Memory>((size_t)bytes);
  Arenas& all = arenas();
  const std::lock_guard<std::mutex> hold(all.lock);
  all.by_id.emplace(all.next, std::move(memory));
  c.give(all.next++);
  return true;
}

bool arena_take(Call& c) {
  const int64_t id = c.integer(), bytes = c.integer();
  Arenas& all = arenas();
  const std::lock_guard<std::mutex> hold(all.lock);
  const auto found = all.by_id.find(id);
  HQQ_CHECK(found != all.by_id.end(), "there is no arena ", id);
  Memory& memory = *found->second;
  HQQ_CHECK(bytes >= 0 && (size_t)bytes <= memory.size - memory.used, "an arena of ", (int64_t)memory.size, " bytes, of which ",
            (int64_t)memory.used, " are taken, has no ", bytes, " more");
  char* const data = memory.data + memory.used;
  memory.used = std::min(memory.size, memory.used + ((size_t)bytes + 63) / 64 * 64);
  const auto done = [](void*, void* context) { delete (std::shared_ptr<Memory>*)context; };
  c.give(from_blob(data, Sizes{&bytes, 1}, Scalar::uint8, done, new std::shared_ptr<Memory>(found->second)));
  return true;
}

bool arena_delete(Call& c) {
  const int64_t id = c.integer();
  std::shared_ptr<Memory> last;  // freed without the lock
  Arenas& all = arenas();
  const std::lock_guard<std::mutex> hold(all.lock);
  const auto found = all.by_id.find(id);
  if (found == all.by_id.end()) return true;
  last = std::move(found->second);
  all.by_id.erase(found);
  return true;
}

}  // namespace hqqtensor
