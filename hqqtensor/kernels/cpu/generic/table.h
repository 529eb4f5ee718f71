// The table of this instruction set's functions. Included last by each */target.cpp.
#pragma once
#include "generic/assign.h"
#include "generic/linear_rows.h"
#include "generic/short_rows.h"
#include "generic/solve.h"
#include "generic/solve_levels.h"

#define HQQTENSOR_TABLE(name, linear_panel, panel_shape, linear_panel_scratch, pack_tokens, pack_step, packed_size)     \
  {                                                                                                                     \
    name, prepare, prepare_axis0, linear_rows, linear_rows_scratch, linear_panel, panel_shape, linear_panel_scratch,    \
        linear_dense, linear_dense_scratch, pack_tokens, pack_step, 12, packed_size, dequantize_row, dequantize_rows,   \
        kFloats, extremes, solve_block, hqq_block, solve_levels, lloyd_block, assign_row, to_float, from_float          \
  }
