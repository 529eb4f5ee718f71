// The part of an instruction set's table that generic code fills. target.cpp adds the rest: linear_dense, and linear_panel
// where the set has panels.
#pragma once
#include "generic/assign.h"
#include "generic/attention.h"
#include "generic/column_spread.h"
#include "generic/linear_rows.h"
#include "generic/short_rows.h"
#include "generic/solve.h"
#include "generic/solve_levels.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr Kernels generic_kernels(const char* name) {
  return {
      .name = name,
      .quantize_activations = quantize_activations,
      .quantize_activations_axis0 = quantize_activations_axis0,
      .linear_rows = linear_rows,
      .linear_rows_scratch = linear_rows_scratch,
      .linear_panel = nullptr,
      .panel_shape = nullptr,
      .linear_panel_scratch = nullptr,
      .linear_dense = nullptr,
      .linear_dense_scratch = nullptr,
      .dense_row_multiple = 12,
      .plan_activations = nullptr,
      .plan_column_multiple = 0,
      .pack_activations = nullptr,
      .pack_row_multiple = 1,
      .packed_activations_size = nullptr,
      .dequantize_row = dequantize_row,
      .dequantize_rows = dequantize_rows,
      .to_float = to_float,
      .from_float = from_float,
      .rms_norm = rms_norm,
      .attend = attend,
      .dot_rows = dot_rows,
      .dense_rows = dense_rows,
      .gate = gate,
      .lanes = kFloats,
      .extremes = extremes,
      .spread_rows = spread_rows,
      .solve_block = solve_block,
      .solve_weighted_block = solve_weighted_block,
      .feed_back_block = feed_back_block,
      .hqq_block = hqq_block,
      .solve_levels = solve_levels,
      .lloyd_block = lloyd_block,
      .assign_row = assign_row,
  };
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
