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
void assign(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const at::Tensor& zero_point,
            int64_t nbits, int64_t group_size, int64_t axis);

// What codes stand for at scale 1: values and thresholds, float32 [L] and [L - 1] or a row of them for every row of the
// weight; the code of each level, uint8 [L]; for floating-point formats the bits of the mantissa (else -1, and L <= 16) and
// the smallest number with a leading one.
using LevelTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, int64_t, double>;

// The same two steps for formats that have a scale only.
at::Tensor solve_levels(const at::Tensor& weight, int64_t group_size, int64_t axis, const std::string& solver,
                        const LevelTensors& levels);
// One round of Lloyd's rule on groups, float32 [R, C, group], with scales [R, C]: the squared error [rows, 1], the best scales
// for the nearest codes [R, C], and with those, by code, sums of scale * weight and of scale^2, [rows, L]; rows is that of
// the levels, R or 1. Codes must be 0 to L - 1.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lloyd(const at::Tensor& groups, const at::Tensor& scales,
                                                                 const LevelTensors& levels);
void assign_levels(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const LevelTensors& levels,
                   int64_t nbits, int64_t group_size, int64_t axis);

}  // namespace hqqtensor
