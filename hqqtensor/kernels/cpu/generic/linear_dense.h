// y = x W^T for many rows of x: a panel of weight rows is made dense in cache and used for all of x.
// Also serves groups that do not line up with lanes, and activations that cannot be quantized to integers.
#pragma once
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kDensePanelFloats = 1 << 17;  // 512 KiB: about half of a second-level cache
constexpr int64_t kDenseDepth = 1024;           // columns multiplied at a time: a tile's rows stay in the first level

inline int64_t dense_panel_rows(const Problem& p) {
  const int64_t rows = kDensePanelFloats / p.w.K / kDenseTileRows * kDenseTileRows;
  return rows < kDenseTileRows ? kDenseTileRows : rows > 96 ? 96 : rows;
}

int64_t linear_dense_scratch(const Problem& p) { return dense_panel_rows(p) * (p.w.K + p.M) + 64; }

template <int T>
void dense_tile(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth, float* out,
                int64_t out_stride) {
  Floats acc[T][kDenseTileRows];
  for (auto& row : acc)
    for (auto& a : row) a = f_zero();
  int64_t k = 0;
  for (; k + kFloats <= depth; k += kFloats) {
    Floats xs[T];
    for (int t = 0; t < T; ++t) xs[t] = f_load(x + t * x_stride + k);
    for (int r = 0; r < kDenseTileRows; ++r) {
      const Floats v = f_load(w + r * w_stride + k);
      for (int t = 0; t < T; ++t) acc[t][r] = f_fma(v, xs[t], acc[t][r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kDenseTileRows; ++r) {
      float s = f_sum(acc[t][r]);
      for (int64_t i = k; i < depth; ++i) s += w[r * w_stride + i] * x[t * x_stride + i];
      out[t * out_stride + r] += s;
    }
}

template <int T = kDenseTileTokens>
void dense_column(int64_t tokens, const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth, float* out,
                  int64_t out_stride) {
  int64_t m = 0;
  for (; m + T <= tokens; m += T)
    dense_tile<T>(w, w_stride, x + m * x_stride, x_stride, depth, out + m * out_stride, out_stride);
  if constexpr (T > 1)
    if (m < tokens)
      dense_column<T - 1>(tokens - m, w, w_stride, x + m * x_stride, x_stride, depth, out + m * out_stride, out_stride);
}

void linear_dense(const Problem& p, const DenseActivations& x, int64_t first, int64_t last, float* scratch) {
  const int64_t K = p.w.K, rows = dense_panel_rows(p);
  float *panel = scratch, *sums = scratch + rows * K;
  for (int64_t n = first; n < last; n += rows) {
    const int64_t count = last - n < rows ? last - n : rows,
                  whole = (count + kDenseTileRows - 1) / kDenseTileRows * kDenseTileRows;
    for (int64_t r = 0; r < count; ++r) dequantize_row(p.w, n + r, panel + r * K);
    __builtin_memset(panel + count * K, 0, sizeof(float) * (size_t)((whole - count) * K));
    __builtin_memset(sums, 0, sizeof(float) * (size_t)(p.M * rows));
    for (int64_t k = 0; k < K; k += kDenseDepth) {
      const int64_t depth = K - k < kDenseDepth ? K - k : kDenseDepth;
      for (int64_t r = 0; r < whole; r += kDenseTileRows)
        dense_column(p.M, panel + r * K + k, K, x.x + k, x.stride, depth, sums + r, rows);
    }
    for (int64_t m = 0; m < p.M; ++m) store_results(p, m, n, 1, count, sums + m * rows);
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
