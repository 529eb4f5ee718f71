// Products through AMX, everything else as kernels_avx512 has it. Only dispatch/select.cpp may call in here, after asking the
// processor and the system.
// Headers of the standard library come before the pragma: their inline functions must stay runnable anywhere.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch/kernels.h"
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c,bmi2,popcnt")
#pragma GCC diagnostic ignored "-Wunused-function"  // of the headers shared with avx512/target.cpp
#include "avx512/vec.h"
// Order matters: the headers below are written in terms of the vectors above.
#include "amx/dense.h"
#include "amx/panel.h"

namespace hqqtensor {
namespace {
void amx_panel(const Problem& p, const Digits& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  (d.apart ? linear_amx : kernels_avx512()->linear_panel)(p, d, first, last, step, scratch);
}
int64_t amx_panel_scratch(const Problem& p) {
  return std::max(AmxRoom(p.w, p.M).floats(), kernels_avx512()->linear_panel_scratch(p));
}
// Measured: from how many tokens on parts of bfloat16 are faster than integers.
int64_t integer_tokens(const Weight& w, int digits) {
  if (digits == 1 || (w.axis == 1 && amx_serves(w))) return INT64_MAX;
  if (w.axis == 0) return w.group_size < 64 ? 8 : digits == 3 ? 32 : 16;
  return digits == 3 ? 96 : 48;
}
PanelShape amx_panel_shape(const Weight& w, int64_t M, int digits) {
  PanelShape shape = kernels_avx512()->panel_shape(w, M, digits);
  if (amx_serves(w) && M >= kAmxTokens) shape.tile = 16, shape.apart = true;
  shape.integer_tokens = integer_tokens(w, digits);
  return shape;
}
}  // namespace

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels k = *kernels_avx512();
    k.name = "amx";
    k.linear_panel = amx_panel;
    k.linear_panel_scratch = amx_panel_scratch;
    k.panel_shape = amx_panel_shape;
    k.linear_dense = linear_dense_amx;
    k.linear_dense_scratch = linear_dense_amx_scratch;
    k.pack_tokens = pack_parts;
    k.packed_size = packed_parts_size;
    k.pack_step = kTileRows;
    k.dense_step = 32;
    return k;
  }();
  return &table;
}
}  // namespace hqqtensor
#else
namespace hqqtensor {
const Kernels* kernels_amx() { return nullptr; }
}  // namespace hqqtensor
#endif
