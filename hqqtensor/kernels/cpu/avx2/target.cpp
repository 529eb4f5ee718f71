// Compiled for AVX2 whatever the compiler's default is: only dispatch/select.cpp may call in here, after has_avx2().
#include "avx2/target.h"

#include "dispatch/targets.h"
#if defined(__x86_64__)
#include "avx2/dense.h"
#include "avx2/panel.h"
#include "dispatch/processor.h"
#include "generic/table.h"

namespace hqqtensor {

bool has_avx2() {
  const Processor p;
  return p.saves(kAvxRegisters) && Processor::all(p.leaf1_ecx, bit_FMA | bit_F16C | bit_POPCNT) &&
         Processor::all(p.leaf7_ebx, bit_AVX2 | bit_BMI2);
}

const Kernels* kernels_avx2() {
  static constexpr Kernels table = [] {
    Kernels k = generic_kernels("avx2");
    k.linear_panel = linear_panel;
    k.panel_shape = panel_shape;
    k.linear_panel_scratch = linear_panel_scratch;
    k.linear_dense = linear_dense;
    k.linear_dense_scratch = linear_dense_scratch;
    k.pack_activations = pack_activations;
    k.pack_row_multiple = kDenseTokens;
    k.packed_activations_size = packed_activations_size;
    return k;
  }();
  return &table;
}

}  // namespace hqqtensor
#else
namespace hqqtensor {
bool has_avx2() { return false; }
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace hqqtensor
#endif
