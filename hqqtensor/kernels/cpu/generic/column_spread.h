// The alternation of column scales (hqqtensor/transforms/column_scale.py), some rows at a time.
#pragma once
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// R rows of a type, w[r]; the rest as in struct Kernels.
template <DType T, int R>
void spread_some(const char* const (&w)[R], int64_t K, float unit, const float* inverse_columns, float* sums) {
  const Floats u = f_set(unit);
  const int64_t whole = K / kFloats * kFloats;
  Floats parts[R], factor[R];
  float inverse[R];
  for (Floats& part : parts) part = f_zero();
  for (int64_t i = 0; i < whole; i += kFloats) {
    const Floats column = f_load(inverse_columns + i);
    for (int r = 0; r < R; ++r) {
      const Floats v = f_mul(load_as<T>(w[r], i), u);
      parts[r] = f_fma(f_mul(v, v), column, parts[r]);
    }
  }
  const auto square = [&](int r, int64_t i) {
    float v;
    to_float(w[r] + i * size_of(T), T, 1, &v);
    return v * unit * (v * unit);
  };
  for (int r = 0; r < R; ++r) {
    float total = f_sum(parts[r]);
    for (int64_t i = whole; i < K; ++i) total += square(r, i) * inverse_columns[i];
    inverse[r] = total > 0 ? (float)K / total : 1;
    factor[r] = f_set(inverse[r]);
  }
  for (int64_t i = 0; i < whole; i += kFloats) {
    Floats sum = f_load(sums + i);
    for (int r = 0; r < R; ++r) {
      const Floats v = f_mul(load_as<T>(w[r], i), u);
      sum = f_fma(f_mul(v, v), factor[r], sum);
    }
    f_store(sums + i, sum);
  }
  for (int64_t i = whole; i < K; ++i)
    for (int r = 0; r < R; ++r) sums[i] += square(r, i) * inverse[r];
}

void spread_rows(const void* rows, DType type, int64_t count, int64_t stride, int64_t K, float unit,
                 const float* inverse_columns, float* sums) {
  const auto of_type = [&](auto t) {
    constexpr DType T = decltype(t)::value;
    const auto* at = (const char*)rows;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4, at += 4 * stride)
      spread_some<T, 4>({at, at + stride, at + 2 * stride, at + 3 * stride}, K, unit, inverse_columns, sums);
    for (; r < count; ++r, at += stride) spread_some<T, 1>({at}, K, unit, inverse_columns, sums);
  };
  if (type == DType::f32) return of_type(std::integral_constant<DType, DType::f32>());
  if (type == DType::f16) return of_type(std::integral_constant<DType, DType::f16>());
  of_type(std::integral_constant<DType, DType::bf16>());
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
