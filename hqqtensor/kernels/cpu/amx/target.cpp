// Products through AMX; everything else is as kernels_avx512 has it. Only dispatch/select.cpp may call in here, after
// has_amx().
#include "amx/target.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of headers shared with avx512/target.cpp
#include "dispatch/targets.h"
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "amx/bytes.h"
#include "amx/panel.h"

#include "dispatch/processor.h"

namespace hqqtensor {

// CPUID leaf 7 tells of tiles, of their products of bytes and of bf16, of permutations of bytes, and of vectors rounded to
// bf16. Linux gives a process the tile registers when it asks for them.
bool has_amx() {
  constexpr unsigned tiles = 1u << 24 | 1u << 25 | 1u << 22, permutations = 1u << 1, rounding = 1u << 5;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  const Processor p;
  return has_avx512() && Processor::all(p.leaf7_edx, tiles) && Processor::all(p.leaf7_ecx, permutations) &&
         Processor::all(p.leaf7_1_eax, rounding) && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels k = *kernels_avx512();
    k.name = "amx";
    k.linear_panel = linear_panel;
    k.panel_shape = panel_shape;
    k.linear_panel_scratch = linear_panel_scratch;
    k.linear_dense = linear_dense;
    k.linear_dense_scratch = linear_dense_scratch;
    k.dense_row_multiple = 32;
    k.plan_activations = plan_activations;
    k.plan_column_multiple = kByteSlice;
    k.pack_activations = pack_activations;
    k.pack_row_multiple = kAmxTileRows;
    k.packed_activations_size = packed_activations_size;
    return k;
  }();
  return &table;
}

}  // namespace hqqtensor
#else
namespace hqqtensor {
bool has_amx() { return false; }
const Kernels* kernels_amx() { return nullptr; }
}  // namespace hqqtensor
#endif
