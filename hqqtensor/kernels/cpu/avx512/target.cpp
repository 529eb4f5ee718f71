// Built for avx512 whatever the compiler's default: only dispatch/select.cpp may call in here, after asking the processor.
// Headers of the standard library come before the pragma: their inline functions must stay runnable anywhere.
#include <array>
#include <cstdint>
#include <cmath>
#include <type_traits>
#include <utility>

#include "dispatch/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2,popcnt")
#include "avx512/vec.h"
#include "avx512/pairs.h"
#include "avx512/wide.h"
// Order matters: the headers below are written in terms of the vectors above.
#include "generic/linear_dense.h"
#include "avx512/panel.h"
#include "generic/table.h"

namespace hqqtensor {
const Kernels* kernels_avx512() {
  constexpr auto shape = [](const Weight& w, int64_t, int digits) {
    // Widths that fill a nibble or a byte cost linear_rows least.
    const int64_t rows = w.table.values ? 1 : w.nbits == 8 ? 6 : w.nbits == 4 ? 4 : 2;
    return PanelShape{panel_tile(w, digits), false, false, rows, dear(w, digits) ? 48 : INT64_MAX};
  };
  static const Kernels table = HQQTENSOR_TABLE("avx512", linear_panel, shape, linear_panel_scratch, nullptr, 1, nullptr);
  return &table;
}
}  // namespace hqqtensor
#else
namespace hqqtensor {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace hqqtensor
#endif
