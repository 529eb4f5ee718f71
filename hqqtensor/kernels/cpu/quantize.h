// Quantizing a matrix on the CPU: the two steps around the rounding of scales for storage.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <tuple>

namespace hqqtensor {

// Inverse scale and zero point, float32, of each group of weight [N, K]: [N, groups] (axis 1) or [groups, K] (axis 0).
std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& weight, int64_t nbits, int64_t group_size, int64_t axis,
                                         const std::string& solver);

// Nearest codes for given inverse scales and zero points, packed into out, uint8 [N, row bytes].
void assign(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const at::Tensor& zero_point, int64_t nbits,
                  int64_t group_size, int64_t axis);

}  // namespace hqqtensor
