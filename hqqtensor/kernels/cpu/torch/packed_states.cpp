#include "torch/packed_states.h"

namespace hqqtensor {

PackedStates::PackedStates(Call& c, int64_t head_dim)
    : tensors_(c.optional_tensors()), settings_(c.integers()), head_dim_(head_dim), signs_(c.optional_tensor()) {
  if (tensors_.empty()) return;
  HQQ_CHECK(tensors_.size() % 6 == 0 && settings_.size() == 6,
            "packed states are 6 tensors of each cache with 6 settings, got ", (int64_t)tensors_.size(), " and ",
            (int64_t)settings_.size());
  const bool rotated = settings_[4] != 0 || settings_[5] != 0;
  HQQ_CHECK(rotated == (bool)signs_, "packed states have signs if they are rotated, got ", signs_);
  if (!rotated) return;
  HQQ_CHECK((head_dim & (head_dim - 1)) == 0, "rotated states need heads of a power of two, got ", head_dim);
  HQQ_CHECK(signs_.dim() == 1 && signs_.size(0) == head_dim && signs_.scalar() == Scalar::float32 && signs_.is_contiguous() &&
                signs_.is_cpu(),
            "signs of packed states must be contiguous float32 [", head_dim, "], got ", signs_);
}

std::unique_ptr<PackedWeights> PackedStates::read(size_t first, int64_t axis) const {
  const Tensor* const parts = &tensors_[first];
  const PackedArguments a{parts[0].borrow(), parts[1].borrow(), parts[2].borrow(), {}, settings_[0], "int", settings_[1], axis,
                          head_dim_};
  return std::make_unique<PackedWeights>(a, 5, 0);
}

PackedCache PackedStates::of(size_t i, int64_t batch, int64_t kv_heads) {
  for (const size_t part : {0, 3}) {
    const Tensor& qdata = tensors_[6 * i + part];
    weights_.push_back(read(6 * i + part, settings_[part ? 3 : 2]));
    HQQ_CHECK(qdata.size(1) == batch && qdata.size(2) == kv_heads && qdata.size(3) >= 1 && qdata.size(3) <= kMostPacked,
              "packed states must be [blocks, ", batch, ", ", kv_heads, ", 1 to ", kMostPacked, ", row_bytes], got ", qdata);
  }
  const Tensor &keys = tensors_[6 * i], &values = tensors_[6 * i + 3];
  HQQ_CHECK(values.size(0) == keys.size(0) && values.size(3) == keys.size(3), "as many packed values as keys are needed");
  const PackedWeights *const old_keys = weights_[weights_.size() - 2].get(), *const old_values = weights_.back().get();
  PackedCache cache;
  cache.blocks = keys.size(0), cache.block = keys.size(3), cache.stride = batch * kv_heads;
  cache.keys = [old_keys](int64_t n) { return old_keys->at(n); };
  cache.values = [old_values](int64_t n) { return old_values->at(n); };
  cache.signs = signs_ ? (const float*)signs_.data() : nullptr;
  cache.rotated_keys = settings_[4] != 0, cache.rotated_values = settings_[5] != 0;
  return cache;
}

}  // namespace hqqtensor
