// Compiled for AVX-512 whatever the compiler's default is: only dispatch/select.cpp may call in here, after has_avx512().
#include "avx512/target.h"

#include "dispatch/targets.h"
#if defined(__x86_64__)
#include "avx512/panel.h"
#include "generic/linear_dense.h"
#include "generic/table.h"

namespace hqqtensor {

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
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
