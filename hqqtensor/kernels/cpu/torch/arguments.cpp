#include "torch/operators.h"

namespace hqqtensor {

void read_packed(Call& c, PackedArguments& a) {
  a.qdata = c.tensor();
  a.scale = c.tensor();
  a.zero = c.optional_tensor();
}

void read_settings(Call& c, PackedArguments& a) {
  a.meta = c.optional_tensors();
  a.nbits = c.integer();
  a.format = c.text();
  a.group_size = c.integer();
  a.axis = c.integer();
  a.in_features = c.integer();
}

FloatVector::FloatVector(const Tensor& t, const char* name, int64_t size) {
  if (!t) return;
  HQQ_CHECK(t.dim() == 1 && t.size(0) == size && is_floating(t.scalar()), name, " must be floating-point [", size, "], got ",
            t);
  const auto type = dtype_of(t.scalar());
  if (!type || !t.is_contiguous()) {
    copy_ = converted(t, Scalar::float32);
    data = (const float*)copy_.data();
  } else if (*type == DType::f32) {
    data = (const float*)t.data();
  } else {
    floats_.resize((size_t)size);
    kernels().to_float(t.data(), *type, size, floats_.data());
    data = floats_.data();
  }
}

std::vector<int64_t> integers_of(const Tensor& t) {
  const bool as_it_is = t.scalar() == Scalar::int64 && t.is_contiguous();
  const Tensor copy = as_it_is ? Tensor() : converted(t, Scalar::int64);
  const int64_t count = t.numel();
  const auto* from = (const int64_t*)(as_it_is ? t : copy).data();
  return {from, from + count};
}

}  // namespace hqqtensor
