#include <cmath>
#include <type_traits>
#include <utility>

#include "portable/vec.h"
// Order matters: the headers below are written in terms of the vectors above.
#include "generic/linear_dense.h"
#include "generic/table.h"

namespace hqqtensor {
const Kernels* kernels_portable() {
  static const Kernels table = HQQTENSOR_TABLE("portable", nullptr, nullptr, nullptr, nullptr, 1, nullptr);
  return &table;
}
}  // namespace hqqtensor
