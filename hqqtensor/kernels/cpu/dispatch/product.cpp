#include "dispatch/product.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "dispatch/scratch.h"

namespace hqqtensor {
namespace {

constexpr int64_t kMaxRowsForGemvAlone = 16;  // M up to which linear_rows beats linear_dense where there is no linear_panel

}  // namespace

bool batch_invariant() {
  static const bool asked = [] {
    const char* const value = std::getenv("HQQTENSOR_BATCH_INVARIANT");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return asked;
}

PanelShape panel_shape(const Weight& w, int64_t M, int digits) {
  const Kernels& k = kernels();
  PanelShape shape{.layout = Layout::rows,
                   .tile = 0,
                   .max_rows_for_gemv = kMaxRowsForGemvAlone,
                   .max_rows_for_integers = costly_as_integers(w, digits) ? kMaxRowsForGemvAlone : INT64_MAX};
  if (k.linear_panel) shape = k.panel_shape(w, batch_invariant() ? 1 : M, digits);
  if (!batch_invariant()) return shape;
  // One kernel for every M: that of the panels, or of rows where there are none; and no rounding of weights, to bf16 or to 8
  // bits.
  return {.layout = shape.layout,
          .tile = shape.tile,
          .max_rows_for_gemv = shape.layout == Layout::rows ? INT64_MAX / 2 : 0,
          .max_rows_for_integers = INT64_MAX};
}

bool linear_rows_serves(const Weight& w, int64_t M, int digits) {
  const PanelShape shape = panel_shape(w, M, digits);
  if (quad_rows(w)) return M <= (shape.max_rows_for_gemv + 1) / 2;
  return chunk_groups(w) && (M <= shape.max_rows_for_gemv || (shape.layout == Layout::rows && w.axis == 0 && digits == 1));
}

bool integers_serve(const Weight& w, int64_t M, int digits) {
  if (!integer_codes(w) || !quad_groups(w)) return false;
  const PanelShape shape = panel_shape(w, M, digits);
  return M <= shape.max_rows_for_integers && (shape.layout != Layout::rows || linear_rows_serves(w, M, digits));
}

bool rounding_serves(const Problem& p, int digits) {
  return p.rounded && p.M > panel_shape(p.w, p.M, digits).max_rows_unrounded;
}

bool bytes_serve(const Weight& w, int64_t M, int digits) {
  return digits == 1 && M > panel_shape(w, M, digits).max_rows_before_bytes;
}

int64_t quantized_bytes(const Weight& w, int64_t M, int digits) {
  const int64_t chunks = row_chunks(w), bytes = std::max(digits, 2);  // of an activation, in any layout
  return (M * (chunks * bytes * 64 + 4 * steps_per_row(w) + 4 * padded(w.axis == 1 ? w.groups : 1)) + 191) / 64 * 64;
}

QuantizedActivations quantized_in(const Weight& w, int64_t M, int digits, char* memory) {
  const PanelShape shape = linear_rows_serves(w, M, digits) ? PanelShape{} : panel_shape(w, M, digits);
  QuantizedActivations x{.digits = (int8_t*)memory,
                         .step = nullptr,
                         .sum = nullptr,
                         .M = M,
                         .chunks = shape.layout == Layout::rows ? row_chunks(w) : (w.K + 63) / 64,
                         .steps_per_row = steps_per_row(w),
                         .count = digits,
                         .tile = shape.tile,
                         .layout = shape.layout};
  x.step = (float*)(memory + M * x.chunks * x.bytes() * 64);
  x.sum = x.step + M * x.steps_per_row;
  return x;
}

void multiply(const Problem& p, const QuantizedActivations* x, int64_t first, int64_t last) {
  const Kernels& k = kernels();
  if (x->layout == Layout::rows)
    return k.linear_rows(p, x, first, last, (float*)scratch(4 * k.linear_rows_scratch(p, x->steps_per_row), Scratch::kernel));
  float* memory = (float*)scratch(4 * k.linear_panel_scratch(p), Scratch::kernel);
  if (p.w.axis == 1) return k.linear_panel(p, *x, first, last, 1, memory);
  for (int64_t g = first; g < last; ++g) k.linear_panel(p, x[g - first], g, p.w.N, p.w.groups, memory);
}

// Activations of 8 bits count as what is left of them, their product with the step, a float32.
int splits_of(const Problem& p, int digits) {
  if (rounding_serves(p, digits)) return 1;
  if (digits == 3 || (digits == 1 && p.x_type == DType::f32)) return 3;
  return digits == 2 && p.x_type == DType::bf16 && p.pre_scale == nullptr ? 1 : 2;
}

}  // namespace hqqtensor
