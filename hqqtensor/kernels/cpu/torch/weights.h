// From the tensors of an operator to a Weight, checked; and the tables of the named formats.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "dispatch/kernels.h"

namespace hqqtensor {

// What every operator takes after its own arguments; see hqqtensor/ops/definitions.py.
struct Settings {
  at::TensorList meta;
  int64_t nbits;
  c10::string_view format;
  int64_t group_size, axis, in_features;
};

std::optional<DType> dtype_of(at::ScalarType);  // of numbers: float32, float16, bfloat16

// The values, float32, that the codes of a format stand for; hqqtensor/kernels/cpu/__init__.py passes them on.
void set_table(const std::string& format, int64_t nbits, const at::Tensor& values);
bool has_table(c10::string_view format, int64_t nbits);

struct Packed {  // a Weight and the tensors that keep its memory
  at::Tensor qdata, scale, zero, own[4];
  Weight w;
};

// Of 2-D tensors. `digits`: those of the activations, which say how fine the digits of a table must be (0: none).
Packed packed(const at::Tensor& qdata, const at::Tensor& scale, const std::optional<at::Tensor>& zero, const Settings&,
              int digits);

}  // namespace hqqtensor
