#include "torch/pool.h"

#include <algorithm>

#include "dispatch/pages.h"
#include "torch/operators.h"
#include "torch/registry.h"

namespace hqqtensor {
namespace {

constexpr size_t kKept = 2;  // pieces: the keys and the values of a layer

Registry<Pool>& pools() {
  static auto* const all = new Registry<Pool>("pool");  // outlives all tensors: these may be freed when the process ends
  return *all;
}

}  // namespace

Pool::Pool() { free_.reserve(kKept + 1); }  // so that give_back cannot fail

Pool::~Pool() {
  for (const Piece& piece : free_) hqqtensor::release(piece.data, piece.bytes);
}

Tensor Pool::empty(Sizes sizes, Scalar scalar, int64_t item_size) {
  const int64_t count = checked_product(sizes);
  HQQ_CHECK(count <= INT64_MAX / item_size, "a tensor of ", count, " numbers is too large");
  const auto bytes = (size_t)(count * item_size);
  Piece piece{nullptr, bytes + bytes / 8 + 64};  // a growing tensor fits for a while
  {
    const std::lock_guard<std::mutex> hold(lock_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->bytes >= bytes && (best == free_.end() || it->bytes < best->bytes)) best = it;
    if (best != free_.end()) {
      piece = *best;
      free_.erase(best);
    }
  }
  if (piece.data == nullptr) piece.data = allocate(piece.bytes);
  const auto done = [](void*, void* context) {
    const std::unique_ptr<Lease> lease((Lease*)context);
    lease->pool->give_back(lease->piece);
  };
  return from_blob(piece.data, sizes, scalar, done, new Lease{shared_from_this(), piece});
}

void Pool::give_back(Piece piece) {
  const std::lock_guard<std::mutex> hold(lock_);
  free_.push_back(piece);
  if (free_.size() <= kKept) return;
  const auto smallest =
      std::min_element(free_.begin(), free_.end(), [](const Piece& a, const Piece& b) { return a.bytes < b.bytes; });
  hqqtensor::release(smallest->data, smallest->bytes);
  free_.erase(smallest);
}

bool pool_new(Call& c) {
  c.give(pools().add(std::make_shared<Pool>()));
  return true;
}

bool pool_delete(Call& c) {
  pools().remove(c.integer());
  return true;
}

bool pool_empty(Call& c) {
  const int64_t id = c.integer();
  const auto sizes = c.integers();
  const auto code = (int32_t)c.integer();
  const std::shared_ptr<Pool> pool = pools().find(id);
  const Scalar scalar = scalar_of(code);
  HQQ_CHECK(scalar != Scalar::other, "a pool has no tensors of this dtype");
  c.give(pool->empty(sizes, scalar, (int64_t)aoti_torch_dtype_element_size(code)));
  return true;
}

bool empty_packed(Call& c) {
  const auto sizes = c.integers();
  const auto bytes = (size_t)checked_product(sizes);
  if (bytes < kHugePage) {
    c.give(empty(sizes, Scalar::uint8));
    return true;
  }
  const auto done = [](void* data, void* bytes) { hqqtensor::release(data, (size_t)bytes); };
  c.give(from_blob(allocate(bytes), sizes, Scalar::uint8, done, (void*)bytes));
  return true;
}

}  // namespace hqqtensor
