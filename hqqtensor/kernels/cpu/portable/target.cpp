#include "portable/target.h"

#include "dispatch/targets.h"
#include "generic/linear_dense.h"
#include "generic/table.h"

namespace hqqtensor {

bool has_portable() { return true; }

const Kernels* kernels_portable() {
  static constexpr Kernels table = [] {
    Kernels k = generic_kernels("portable");
    k.linear_dense = linear_dense;
    k.linear_dense_scratch = linear_dense_scratch;
    return k;
  }();
  return &table;
}

}  // namespace hqqtensor
