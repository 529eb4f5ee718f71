// Which kernel makes which product:
//   linear_rows   integers, few tokens        each packed row is read once and multiplied as it lies
//   linear_panel  integers, several tokens    rows of the weight are transposed in cache, panel by panel
//   linear_dense  float32 or bf16, the rest   rows of the weight are dequantized in cache, panel by panel
// Kernels::panel_shape says from how many tokens on the next one is faster.
#include "dispatch/linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "dispatch/product.h"
#include "dispatch/scratch.h"
#include "dispatch/threads.h"

namespace hqqtensor {
namespace {

constexpr int64_t kMaxGroups = 32;             // axis 0: groups whose activations are quantized together
constexpr int64_t kMaxGroupBytes = 256 << 10;  // their bytes: they stay in the second level of cache
constexpr int64_t kMaxRows = 512;              // tokens of one pass: bounds the scratch memory

// Activations in float32, multiplied by pre_scale.
struct FloatRows {
  const float* x;
  int64_t stride;  // numbers from a row to the next
};

// p.x itself where it is such already, else a copy in `copy`, [M, K].
FloatRows float_rows(const Problem& p, float* copy) {
  const Kernels& k = kernels();
  if (p.x_type == DType::f32 && p.pre_scale == nullptr) return {(const float*)p.x, p.x_stride};
  parallel_over(p.M, 1, p.M * p.w.K, [&](int64_t a, int64_t b) {
    for (int64_t m = a; m < b; ++m) {
      float* to = copy + m * p.w.K;
      k.to_float((const char*)p.x + m * p.x_stride * size_of(p.x_type), p.x_type, p.w.K, to);
      if (p.pre_scale)
        for (int64_t i = 0; i < p.w.K; ++i) to[i] *= p.pre_scale[i];
    }
  });
  return {copy, p.w.K};
}

// The thread's scratch memory for the activations of a product: quantized, in float32, and packed for linear_dense.
struct ActivationScratch {
  char* quantized;
  float* floats;
  float* packed;

  ActivationScratch(const Problem& p, int64_t quantized_bytes, int64_t packed_floats) {
    const int64_t count = (p.M * p.w.K + 31) / 16 * 16;
    quantized = scratch(quantized_bytes + 4 * (count + packed_floats) + 64, Scratch::activations);
    floats = (float*)(quantized + quantized_bytes);
    packed = floats + count;
  }
};

// axis 1: the rows of all weights, one after the other, are shared out to threads.
void multiply_parts(const Problem* parts, int64_t count, const QuantizedActivations& x) {
  const Problem& p = *parts;
  int64_t N = 0;
  for (int64_t i = 0; i < count; ++i) N += parts[i].w.N;
  const auto rows = [&](int64_t a, int64_t b) {
    for (int64_t i = 0; i < count && b > 0; a -= parts[i].w.N, b -= parts[i].w.N, ++i)
      if (a < parts[i].w.N) multiply(parts[i], &x, std::max<int64_t>(a, 0), std::min(b, parts[i].w.N));
  };
  if (x.layout == Layout::rows)
    parallel_over_dynamic(N, std::clamp<int64_t>(65536 / p.w.K / 8 * 8, 8, 32), N * p.w.K * p.M, rows);
  else
    parallel_over(N, 32, N * p.w.K * p.M, rows);
}

// Integer products of all parts, which have axis 1. False if x cannot be quantized.
bool multiply_integers(const Problem* parts, int64_t count, const FloatRows& x, int digits, char* memory) {
  const Kernels& k = kernels();
  const Problem& p = *parts;
  std::atomic<bool> complete{true};
  const QuantizedActivations quantized = quantized_in(p.w, p.M, digits, memory);
  parallel_over(p.M, 1, 4 * p.M * p.w.K, [&](int64_t a, int64_t b) {
    for (int64_t m = a; m < b && complete; ++m)
      if (!k.quantize_activations(x.x + m * x.stride, p.w, m, quantized)) complete = false;
  });
  if (complete) multiply_parts(parts, count, quantized);
  return complete;
}

// The same for a weight of axis 0. The scales of a group belong to the activations, which are quantized again for each group:
// for as many groups at a time as stay in the second level of cache.
bool multiply_integers_axis0(const Problem& p, const FloatRows& x, int digits) {
  const Kernels& k = kernels();
  std::atomic<bool> complete{true};
  const int64_t bytes = quantized_bytes(p.w, p.M, digits);
  const int64_t most = std::clamp<int64_t>(kMaxGroupBytes / bytes, 1, kMaxGroups);
  parallel_over(p.w.groups, 1, p.w.N * p.w.K * p.M, [&](int64_t a, int64_t b) {
    const int64_t count = std::min(most, b - a);
    char* memory = scratch(bytes * count, Scratch::group_activations);
    QuantizedActivations quantized[kMaxGroups];
    for (int64_t i = 0; i < count; ++i) quantized[i] = quantized_in(p.w, p.M, digits, memory + bytes * i);
    for (int64_t g = a; g < b && complete; g += count) {
      const int64_t end = std::min(g + count, b);
      for (int64_t i = g; i < end && complete; ++i)
        for (int64_t m = 0; m < p.M && complete; ++m)
          if (!k.quantize_activations_axis0(x.x + m * x.stride, p.w, i, m, quantized[i - g])) complete = false;
      if (complete) multiply(p, quantized, g, end);
    }
  });
  return complete;
}

// Rounds x, [M, K], to 8-bit activations in place, as quantize_activations does: for products that no integer kernel serves.
// False if x holds NaN or Inf.
bool round_rows(const Weight& w, int64_t M, float* x) {
  const int64_t run = step_spans_two_chunks(w) ? 128 : 64;  // columns with one step
  std::atomic<bool> all_finite{true};
  parallel_over(M, 1, 4 * M * w.K, [&](int64_t a, int64_t b) {
    for (int64_t i = a * w.K, end = b * w.K; i < end;) {
      const int64_t stop = std::min(i + run, (i / w.K + 1) * w.K);
      float largest = 0;
      bool finite = true;
      for (int64_t k = i; k < stop; ++k) {
        largest = std::max(largest, std::fabs(x[k]));
        finite = finite && std::isfinite(x[k]);
      }
      if (!finite) all_finite = false;
      // Powers of two keep 127 / top finite for the smallest numbers, and 127 times the step for the largest.
      const float unit = largest < 0x1p-64f ? 0x1p64f : largest > 0x1p64f ? 0x1p-64f : 1, top = largest * unit;
      const float inverse = top == 0 ? 0 : 127 / top, step = top / 127;
      for (; i < stop; ++i) x[i] = std::clamp(std::nearbyint(x[i] * unit * inverse) * step, -top, top) / unit;
    }
  });
  return all_finite;
}

// Token m of a product, as a product.
Problem token_of(const Problem& p, int64_t m) {
  Problem token = p;
  token.M = 1;
  token.x = (const char*)p.x + m * p.x_stride * size_of(p.x_type);
  token.y = (char*)p.y + m * p.y_stride * size_of(p.x_type);
  return token;
}

// False, with nothing done, for activations that cannot be bytes.
bool multiply_dense(const Problem& p, DenseActivations x, float* packed) {
  const Kernels& k = kernels();
  if (x.splits == kByteActivations)
    parallel_over(p.w.K, k.plan_column_multiple, 4 * p.M * p.w.K,
                  [&](int64_t a, int64_t b) { k.plan_activations(x, p.M, a, b, p.w.K, packed); });
  if (k.pack_activations) {
    std::atomic<bool> complete{true};
    parallel_over(p.M, k.pack_row_multiple, 4 * p.M * p.w.K, [&](int64_t a, int64_t b) {
      if (complete && !k.pack_activations(x, p.M, a, b, p.w.K, packed)) complete = false;
    });
    if (complete) x.packed = packed;
    if (!complete && x.splits == kByteActivations) return false;
    if (!complete && batch_invariant() && p.M > 1) {
      for (int64_t m = 0; m < p.M; ++m)
        multiply_dense(token_of(p, m), {x.x + m * x.stride, x.stride, x.splits, nullptr}, packed);
      return true;
    }
  }
  parallel_over(p.w.N, k.dense_row_multiple, p.w.N * p.w.K * p.M, [&](int64_t a, int64_t b) {
    k.linear_dense(p, x, a, b, (float*)scratch(4 * k.linear_dense_scratch(p), Scratch::kernel));
  });
  return true;
}

// A product with kMaxRows tokens at most.
bool run_block(Problem p, int digits) {
  const Kernels& k = kernels();
  p.rounded = rounding_serves(p, digits);
  const bool integers = !p.rounded && integers_serve(p.w, p.M, digits);
  const bool bytes = bytes_serve(p.w, p.M, digits);
  const int splits = splits_of(p, digits);
  const auto packed_size = [&](int s) { return k.pack_activations ? k.packed_activations_size(p.M, p.w.K, s) : 0; };
  const ActivationScratch memory(p, integers && p.w.axis == 1 ? quantized_bytes(p.w, p.M, digits) : 0,
                                 std::max(packed_size(splits), bytes ? packed_size(kByteActivations) : 0));
  FloatRows x = float_rows(p, memory.floats);
  if (bytes && multiply_dense(p, {.x = x.x, .stride = x.stride, .splits = kByteActivations, .packed = nullptr}, memory.packed))
    return true;
  if (integers &&
      (p.w.axis == 1 ? multiply_integers(&p, 1, x, digits, memory.quantized) : multiply_integers_axis0(p, x, digits)))
    return true;
  if (integers && batch_invariant() && p.M > 1) {  // one token that integers do not serve leaves the others where they were
    for (int64_t m = 0; m < p.M; ++m)
      if (!run_block(token_of(p, m), digits)) return false;
    return true;
  }
  if (digits == 1) {
    if (integers || p.w.axis == 0) return false;  // NaN, say; scales of axis 0 belong to the activations before rounding
    if (x.x == p.x)
      for (int64_t m = 0; m < p.M; ++m) std::copy_n(x.x + m * x.stride, p.w.K, memory.floats + m * p.w.K);
    if (!round_rows(p.w, p.M, memory.floats)) return false;
    x = {memory.floats, p.w.K};
  }
  multiply_dense(p, {.x = x.x, .stride = x.stride, .splits = splits, .packed = nullptr}, memory.packed);
  return true;
}

}  // namespace

bool run_linears(Problem* parts, int64_t count, int digits) {
  const Problem& p = *parts;
  // How activations are quantized depends on the digits of a table, and each weight may have a codebook of its own.
  bool alike = p.w.axis == 1 && p.M <= kMaxRows && !rounding_serves(p, digits) && !bytes_serve(p.w, p.M, digits) &&
               integers_serve(p.w, p.M, digits);
  for (int64_t i = 1; i < count; ++i)
    alike = alike && parts[i].w.table.count == p.w.table.count && parts[i].pre_scale == p.pre_scale;
  if (alike) {
    const ActivationScratch memory(p, quantized_bytes(p.w, p.M, digits), 0);
    if (multiply_integers(parts, count, float_rows(p, memory.floats), digits, memory.quantized)) return true;
  }
  for (int64_t i = 0; i < count; ++i)
    if (!run_linear(parts[i], digits)) return false;
  return true;
}

bool run_linear(Problem p, int digits) {
  if (p.w.N == 0) return true;
  const int64_t M = p.M;
  for (int64_t m = 0; m < M; m += kMaxRows) {
    Problem part = p;
    part.M = std::min(kMaxRows, M - m);
    part.x = (const char*)p.x + m * p.x_stride * size_of(p.x_type);
    part.y = (char*)p.y + m * p.y_stride * size_of(p.x_type);
    if (!run_block(part, digits)) return false;
  }
  return true;
}

}  // namespace hqqtensor
