// Compiled for AVX-512 whatever the compiler's default is: only dispatch/select.cpp may call in here, after has_avx512().
#include "avx512/target.h"

#include "dispatch/targets.h"
#if defined(__x86_64__)
#include "avx512/panel.h"
#include "dispatch/processor.h"
#include "generic/linear_dense.h"
#include "generic/table.h"

namespace hqqtensor {

bool has_avx512() {
  const Processor p;
  return has_avx2() && p.saves(kAvx512Registers) &&
         Processor::all(p.leaf7_ebx, bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL) &&
         Processor::all(p.leaf7_ecx, bit_AVX512VNNI);
}

const Kernels* kernels_avx512() {
  static constexpr Kernels table = [] {
    Kernels k = generic_kernels("avx512");
    k.linear_panel = linear_panel;
    k.panel_shape = panel_shape;
    k.linear_panel_scratch = linear_panel_scratch;
    k.linear_dense = linear_dense;
    k.linear_dense_scratch = linear_dense_scratch;
    return k;
  }();
  return &table;
}

}  // namespace hqqtensor
#else
namespace hqqtensor {
bool has_avx512() { return false; }
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace hqqtensor
#endif
