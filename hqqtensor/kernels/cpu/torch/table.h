// Values that the codes of a format stand for, and their digits for kernels that multiply integers.
#pragma once
#include <string_view>

#include "dispatch/kernels.h"
#include "torch/tensor.h"

namespace hqqtensor {

// A table of `entries` values, which must outlive it. digits: those of the activations, 0 if no integers are multiplied.
Table table_of(const float* values, int64_t entries, int digits);

// The table of a named format; null where `set_table` was not told of it.
const Table* find_table(std::string_view format, int64_t nbits, int digits);

}  // namespace hqqtensor
