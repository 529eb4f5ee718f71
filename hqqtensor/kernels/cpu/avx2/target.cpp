// Built for avx2 whatever the compiler's default: only dispatch/select.cpp may call in here, after asking the processor.
// Headers of the standard library come before the pragma: their inline functions must stay runnable anywhere.
#include <cstdint>
#include <cmath>
#include <type_traits>
#include <utility>

#include "dispatch/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,bmi2,popcnt")
#include "avx2/vec.h"
// Order matters: the headers below are written in terms of the vectors above.
#include "avx2/dense.h"
#include "avx2/panel.h"
#include "generic/table.h"

namespace hqqtensor {
const Kernels* kernels_avx2() {
  static const Kernels table =
      HQQTENSOR_TABLE("avx2", linear_panel, panel_shape, linear_panel_scratch, pack_tokens, kDenseTokens, packed_size);
  return &table;
}
}  // namespace hqqtensor
#else
namespace hqqtensor {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace hqqtensor
#endif
