// What stands between the products of a decoder layer: norm, attention over a cache, gate.
#pragma once
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// ---- Exponentials ----

// exp(x) for x[0 .. count), at most 88; below -87 it is that of -87. Relative error 2e-7: a polynomial on half of ln 2, times
// a power of two. Written so that compilers make vectors of it.
__attribute__((noinline)) void exponentials(float* x, int64_t count) {
  constexpr float kLog2e = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2 in two parts
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: to add it rounds to an integer in the low bits
  for (int64_t i = 0; i < count; ++i) {
    const float v = x[i] < -87.0f ? -87.0f : x[i];
    const float shifted = v * kLog2e + kRound, whole = shifted - kRound;
    const float r = (v - whole * kHigh) - whole * kLow;
    float p = 1.9875691500e-4f;  // Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    float scale;
    __builtin_memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    __builtin_memcpy(&scale, &bits, 4);
    x[i] = p * scale;
  }
}

constexpr int64_t kGatePiece = 256;

void gate(GateFunction f, const float* from, const float* up, int64_t count, float* out) {
  alignas(64) float e[kGatePiece];
  // Both are x / (1 + exp(-u)): with u = x, and with twice the argument of gelu's tanh.
  const bool silu = f == GateFunction::silu;
  for (int64_t first = 0; first < count; first += kGatePiece) {
    const int64_t n = count - first < kGatePiece ? count - first : kGatePiece;
    const float *x = from + first, *u = up + first;
    for (int64_t i = 0; i < n; ++i) {
      const float v = x[i], s = silu ? v : 1.5957691216f * (v + 0.044715f * v * v * v);
      e[i] = s < -87.0f ? 87.0f : -s;
    }
    exponentials(e, n);
    for (int64_t i = 0; i < n; ++i) out[first + i] = x[i] / (1.0f + e[i]) * u[i];
  }
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  Floats sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
  int64_t i = 0;
  for (; i + 4 * kFloats <= count; i += 4 * kFloats)
    for (int j = 0; j < 4; ++j) {
      const Floats v = f_load(x + i + j * kFloats);
      sums[j] = f_fma(v, v, sums[j]);
    }
  float total = f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
  for (; i < count; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / (float)count + eps);
  for (i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

// ---- Attention ----

constexpr int64_t kBytesAhead = 4096;  // of rows that are fetched while others are multiplied

// out[h * stride + r]: the product of vector h of q, [H][dim], and of row r of `rows`, [count][dim]; dim: a multiple of 16.
// next: rows of the same size that are read after these, fetched meanwhile; null where there are none.
template <DType T, int H>
void dots(const float* q, const void* rows, int64_t count, int64_t dim, float* out, int64_t stride, const void* next) {
  const int64_t bytes = dim * size_of(T);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; next && i < bytes; i += 64) {
      prefetch((const char*)rows + r * bytes + i + kBytesAhead);
      prefetch((const char*)next + r * bytes + i);
    }
    Floats sums[H];
    for (Floats& sum : sums) sum = f_zero();
    for (int64_t d = 0; d < dim; d += kFloats) {
      const Floats row = load_as<T>(rows, r * dim + d);
      for (int h = 0; h < H; ++h) sums[h] = f_fma(f_load(q + h * dim + d), row, sums[h]);
    }
    for (int h = 0; h < H; ++h) out[h * stride + r] = f_sum(sums[h]);
  }
}

void dot_rows(const float* x, const float* rows, int64_t count, int64_t dim, float* out) {
  dots<DType::f32, 1>(x, rows, count, dim, out, 0, nullptr);
}

template <DType T>
void dense_rows_as(const float* x, int64_t M, const void* rows, int64_t count, int64_t dim, float* out, int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) dots<T, 4>(x + m * dim, rows, count, dim, out + m * stride, stride, nullptr);
  for (; m < M; ++m) dots<T, 1>(x + m * dim, rows, count, dim, out + m * stride, stride, nullptr);
}

void dense_rows(const float* x, int64_t M, const void* rows, DType type, int64_t count, int64_t dim, float* out,
                int64_t stride) {
  if (type == DType::bf16) return dense_rows_as<DType::bf16>(x, M, rows, count, dim, out, stride);
  if (type == DType::f16) return dense_rows_as<DType::f16>(x, M, rows, count, dim, out, stride);
  dense_rows_as<DType::f32>(x, M, rows, count, dim, out, stride);
}

// Sums of values weighted by exp(score - largest), for H heads.
template <DType T, int H>
void weighted_values(const Attention& a, const float* weights, int64_t stride, float* out, int64_t out_stride) {
  constexpr int kColumns = H <= 2 ? 4 : 2;  // vectors of a value at a time: sums stay in registers
  int64_t d = 0;
  const auto columns = [&](auto count) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    Floats sums[H][C];
    for (int h = 0; h < H; ++h)
      for (int c = 0; c < C; ++c) sums[h][c] = f_zero();
    for (int64_t t = 0; t < a.count; ++t) {
      Floats v[C];
      for (int c = 0; c < C; ++c) v[c] = load_as<T>(a.values, t * a.dim + d + c * kFloats);
      for (int h = 0; h < H; ++h) {
        const Floats w = f_set(weights[h * stride + t]);
        for (int c = 0; c < C; ++c) sums[h][c] = f_fma(w, v[c], sums[h][c]);
      }
    }
    for (int h = 0; h < H; ++h)
      for (int c = 0; c < C; ++c) f_store(out + h * out_stride + d + c * kFloats, sums[h][c]);
    d += C * kFloats;
  };
  while (d + kColumns * kFloats <= a.dim) columns(std::integral_constant<int, kColumns>());
  while (d < a.dim) columns(std::integral_constant<int, 1>());
}

// Scores become weights exp(score - largest).
__attribute__((noinline)) void weights_of(const Attention& a, float* scores, float* largest, float* total) {
  const int64_t whole = (a.count + kFloats - 1) / kFloats * kFloats;
  if (a.softcap > 0) {
    // tanh(u) = 1 - 2 / (1 + exp(2 u))
    const float twice = 2.0f / a.softcap;
    for (int64_t t = 0; t < a.count; ++t) scores[t] = scores[t] * twice > 87.0f ? 87.0f : scores[t] * twice;
    exponentials(scores, a.count);
    for (int64_t t = 0; t < a.count; ++t) scores[t] = a.softcap * (1.0f - 2.0f / (1.0f + scores[t]));
  }
  if (a.mask)
    for (int64_t t = 0; t < a.count; ++t)
      if (!a.mask[t]) scores[t] = -__builtin_inff();
  for (int64_t t = a.count; t < whole; ++t) scores[t] = -__builtin_inff();
  Floats top = f_load(scores);
  for (int64_t t = kFloats; t < whole; t += kFloats) top = f_max(top, f_load(scores + t));
  *largest = f_hmax(top);
  *total = 0;
  if (*largest == -__builtin_inff()) {
    for (int64_t t = 0; t < whole; ++t) scores[t] = 0;
    return;
  }
  const float most = *largest;
  for (int64_t t = 0; t < whole; ++t) scores[t] -= most;
  exponentials(scores, whole);
  if (a.mask)  // exp(-87) would be small, but not nothing
    for (int64_t t = 0; t < a.count; ++t) scores[t] = a.mask[t] ? scores[t] : 0;
  for (int64_t t = a.count; t < whole; ++t) scores[t] = 0;
  Floats sum = f_load(scores);
  for (int64_t t = kFloats; t < whole; t += kFloats) sum = f_add(sum, f_load(scores + t));
  *total = f_sum(sum);
}

template <DType T>
void attend_as(const Attention& a) {
  const int64_t stride = padded(a.count), out_stride = a.dim + 2;
  const auto heads = [&](int64_t h, auto count) {
    constexpr int H = decltype(count)::value;
    float *scores = a.scores + h * stride, *out = a.out + h * out_stride;
    dots<T, H>(a.q + h * a.dim, a.keys, a.count, a.dim, scores, stride, h == 0 ? a.values : nullptr);
    for (int i = 0; i < H; ++i) {
      float* end = out + i * out_stride + a.dim;
      weights_of(a, scores + i * stride, end, end + 1);
    }
    weighted_values<T, H>(a, scores, stride, out, out_stride);
  };
  int64_t h = 0;
  for (; h + 4 <= a.heads; h += 4) heads(h, std::integral_constant<int, 4>());
  switch (a.heads - h) {
    case 1: return heads(h, std::integral_constant<int, 1>());
    case 2: return heads(h, std::integral_constant<int, 2>());
    case 3: return heads(h, std::integral_constant<int, 3>());
    default: return;
  }
}

void attend(const Attention& a) {
  if (a.type == DType::bf16) return attend_as<DType::bf16>(a);
  if (a.type == DType::f16) return attend_as<DType::f16>(a);
  attend_as<DType::f32>(a);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
