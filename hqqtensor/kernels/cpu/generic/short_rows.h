// Dense rows of weights with few columns, many at a time: scales are read once for a run of rows, and codes of a short
// block are unpacked as whole slabs. Keys and values of a cache are such rows (64 or 128 columns).
#pragma once
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kRunRows = 64;  // rows whose scales are read together

// Integers with plain scales, few enough a row for those of a run of rows to fit.
inline bool short_rows_serve(const Weight& w) {
  return !w.table.values && w.K <= kUnpackedCodes && !w.scale.quantized() && !w.zero.quantized() &&
         (w.axis == 0 ? w.groups == 1 : w.groups * kRunRows <= kUnpackedCodes);
}

// Scales or zero points of rows [first, first + rows), one after the other.
inline void load_run(const Values& v, int64_t first, int64_t rows, int64_t groups, float* out) {
  if (v.stride == v.row_bytes()) return to_float(v.row(first), v.type, rows * groups, out);
  for (int64_t r = 0; r < rows; ++r) load_values(v, first + r, 0, groups, out + r * groups);
}

void short_rows(const Weight& w, int64_t first, int64_t last, DType type, char* out, int64_t stride) {
  uint8_t codes[kUnpackedCodes + 128];
  float scale[kUnpackedCodes + kFloats], zero[kUnpackedCodes + kFloats], line[kUnpackedCodes];
  if (w.axis == 0) {
    load_values(w.scale, 0, 0, w.K, scale);
    load_values(w.zero, 0, 0, w.K, zero);
  }
  const int64_t size = w.groups == 1 ? w.K : w.group_size;
  for (int64_t n = first; n < last; n += kRunRows) {
    const int64_t rows = last - n < kRunRows ? last - n : kRunRows;
    if (w.axis == 1) {
      load_run(w.scale, n, rows, w.groups, scale);
      load_run(w.zero, n, rows, w.groups, zero);
    }
    for (int64_t r = 0; r < rows; ++r, out += stride * size_of(type)) {
      float* dense = type == DType::f32 ? (float*)out : line;
      unpack_codes(w.qdata + (n + r) * w.row_stride, w.nbits, w.K, codes);
      if (w.axis == 0) {
        dequantize_columns(w, nullptr, codes, w.K, scale, zero, dense);
      } else {
        for (int64_t k = 0, g = r * w.groups; k < w.K; k += size, ++g)
          dequantize_group(w, nullptr, codes + k, w.K - k < size ? w.K - k : size, scale[g], zero[g], dense + k);
      }
      if (type != DType::f32) from_float(line, w.K, type, out);
    }
  }
}

// line: scratch memory for K floats.
void dequantize_rows(const Weight& w, int64_t first, int64_t last, DType type, char* out, int64_t stride, float* line) {
  if (short_rows_serve(w)) return short_rows(w, first, last, type, out, stride);
  for (int64_t n = first; n < last; ++n, out += stride * size_of(type)) {
    dequantize_row(w, n, type == DType::f32 ? (float*)out : line);
    if (type != DType::f32) from_float(line, w.K, type, out);
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
