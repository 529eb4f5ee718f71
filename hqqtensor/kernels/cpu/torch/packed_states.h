// Packed keys and values of caches from the tensors of an operator: hqqtensor/ops/packed_states.py says what these are.
#pragma once
#include <memory>
#include <vector>

#include "dispatch/packed_cache.h"
#include "torch/call.h"
#include "torch/weights.h"

namespace hqqtensor {

// Reads the last three arguments of an operator: Tensor[]? packed, int[] settings, Tensor? signs. Holds what the caches read.
class PackedStates {
 public:
  PackedStates(Call&, int64_t head_dim);

  explicit operator bool() const { return !tensors_.empty(); }
  // Of how many caches there are states.
  size_t count() const { return tensors_.size() / 6; }
  // States of the i-th cache, which has `batch` sequences; all checked. The result refers to this object.
  PackedCache of(size_t i, int64_t batch, int64_t kv_heads);

 private:
  std::unique_ptr<PackedWeights> read(size_t first, int64_t axis) const;

  std::vector<Tensor> tensors_;
  std::vector<int64_t> settings_;
  int64_t head_dim_;
  Tensor signs_;
  std::vector<std::unique_ptr<PackedWeights>> weights_;
};

}  // namespace hqqtensor
