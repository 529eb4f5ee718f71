// The table of this instruction set's functions. Included last by each isa_*.cpp.
#pragma once
#include "linear_large.h"
#include "linear_small.h"
#include "solve.h"

#define HQQTENSOR_TABLE(name)                                                                                    \
  {                                                                                                              \
    name, linear_small, linear_small_scratch, linear_small_axis0, linear_small_axis0_scratch, linear_large,      \
        linear_large_scratch, prepare, dequantize_row, kFloats, solve_block,          \
        assign_row, to_float, from_float                                      \
  }
