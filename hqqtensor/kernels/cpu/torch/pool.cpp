#include "torch/pool.h"

#include <algorithm>

#include "dispatch/pages.h"

namespace hqqtensor {
namespace {

constexpr size_t kKept = 2;  // pieces: the keys and the values of a layer

}  // namespace

Pool::~Pool() {
  for (const Piece& piece : free_) release(piece.data, piece.bytes);
}

at::Tensor Pool::empty(at::IntArrayRef sizes, const at::Tensor& like) {
  const size_t bytes = (size_t)c10::multiply_integers(sizes) * like.element_size();
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
  const auto done = [pool = shared_from_this(), piece](void*) { pool->give_back(piece); };
  return at::from_blob(piece.data, sizes, done, at::TensorOptions().dtype(like.scalar_type()));
}

void Pool::give_back(Piece piece) {
  const std::lock_guard<std::mutex> hold(lock_);
  free_.push_back(piece);
  if (free_.size() <= kKept) return;
  const auto smallest = std::min_element(free_.begin(), free_.end(), [](const Piece& a, const Piece& b) { return a.bytes < b.bytes; });
  release(smallest->data, smallest->bytes);
  free_.erase(smallest);
}

}  // namespace hqqtensor
