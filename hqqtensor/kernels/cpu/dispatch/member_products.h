// Products that the members of a team make together: each quantizes the activations itself, rows of weights are shared out.
#pragma once
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "dispatch/decoder.h"
#include "dispatch/hadamard.h"
#include "dispatch/product.h"
#include "dispatch/scratch.h"
#include "dispatch/team.h"

namespace hqqtensor {
namespace {

inline int64_t floats_of(int64_t count) { return (count + 31) / 16 * 16; }

// Columns of one product, or of several that lie beside each other in y.
inline int64_t columns_of(const std::vector<Linear>& parts) {
  return std::accumulate(parts.begin(), parts.end(), (int64_t)0, [](int64_t n, const Linear& l) { return n + l.w.N; });
}

// Rows of a weight that are one piece of work.
inline int64_t rows_at_a_time(const Weight& w, bool by_row) {
  return by_row ? std::clamp<int64_t>(65536 / w.K / 8 * 8, 8, 32) : kernels().dense_row_multiple * 8;
}

inline bool uses_integers(const Linear& l, int64_t M) { return !l.dense && integers_serve(l.w, M, l.digits); }

// True if the activations are read in float32 and nothing is prepared for all rows of the weight: it is dense, or its scales
// belong to the activations of each group.
inline bool takes_floats(const Linear& l) { return l.dense || l.w.axis == 0; }

inline Problem problem_of(const Linear& l, int64_t M, float* y, int64_t y_stride) {
  return {.w = l.w,
          .x = nullptr,
          .x_stride = l.w.K,
          .M = M,
          .x_type = DType::f32,
          .bias = l.bias,
          .pre_scale = nullptr,
          .y = y,
          .y_stride = y_stride};
}

// The activations of a product as its kernel reads them, in the member's own memory.
struct Activations {
  bool integers;
  QuantizedActivations quantized;
  DenseActivations dense;

  // Quantized, in float32, and packed for linear_dense.
  static int64_t bytes(const Linear& l, int64_t M) {
    if (takes_floats(l)) return 4 * floats_of(M * l.w.K) + 64;
    return quantized_bytes(l.w, M, l.digits) + 4 * (floats_of(M * l.w.K) + packed_floats(l, M)) + 64;
  }
  static int64_t packed_floats(const Linear& l, int64_t M) {
    const auto size = [&](int s) { return floats_of(kernels().packed_activations_size(M, l.w.K, s)); };
    if (!kernels().pack_activations) return 0;
    return std::max(size(splits(l, M)), bytes_serve(l.w, M, l.digits) ? size(kByteActivations) : 0);
  }
  static int splits(const Linear& l, int64_t M) { return splits_of(problem_of(l, M, nullptr, 0), l.digits); }
};

// Bytes of the activations of products that are made together.
inline int64_t bytes_of(const std::vector<Linear>& parts, int64_t M) {
  return std::accumulate(parts.begin(), parts.end(), (int64_t)0,
                         [M](int64_t n, const Linear& l) { return n + Activations::bytes(l, M); });
}

// What a member does of products.
class MemberProducts {
 public:
  explicit MemberProducts(Team& team) : team_(team), k_(kernels()) {}

  // Whether activations were met that no kernel serves. All members compute the same ones, so they agree.
  bool failed() const { return failed_; }

  // x, [M][K], for one product. `memory` moves on.
  Activations prepare(const Linear& l, const float* x, int64_t M, char*& memory) {
    Activations a{};
    const int64_t K = l.w.K;
    char* const quantized = memory;
    auto* const floats = (float*)(memory + (takes_floats(l) ? 0 : quantized_bytes(l.w, M, l.digits)));
    memory += Activations::bytes(l, M) / 64 * 64;
    if (l.pre_scale) {
      for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < K; ++i) floats[m * K + i] = x[m * K + i] * l.pre_scale[i];
      x = floats;
    }
    if (l.rotation) {
      if (x != floats) std::copy_n(x, M * K, floats);
      rotate(floats, M * K, l.rotation);
      x = floats;
    }
    a.dense = {.x = x, .stride = K, .splits = 0, .packed = nullptr};
    if (takes_floats(l)) return a;
    float* const packed = floats + floats_of(M * K);
    const auto pack = [&](int splits) {
      a.dense.splits = splits;
      if (splits == kByteActivations) k_.plan_activations(a.dense, M, 0, K, K, packed);
      if (k_.pack_activations && k_.pack_activations(a.dense, M, 0, M, K, packed)) a.dense.packed = packed;
      return a.dense.packed != nullptr;
    };
    if (bytes_serve(l.w, M, l.digits) && pack(kByteActivations)) return a;
    a.integers = uses_integers(l, M);
    if (a.integers) {
      a.quantized = quantized_in(l.w, M, l.digits, quantized);
      for (int64_t m = 0; m < M && a.integers; ++m) a.integers = k_.quantize_activations(x + m * K, l.w, m, a.quantized);
      if (a.integers) return a;
    }
    if (l.digits == 1) failed_ = true;  // 8-bit activations are rounded elsewhere where integers do not serve
    pack(Activations::splits(l, M));
    return a;
  }

  // Columns [first, last) of y; axis 0: as many, those of some groups. All pieces together are all columns.
  static void columns(const Linear& l, const Activations& a, int64_t M, int64_t first, int64_t last, float* y, int64_t stride) {
    if (l.dense) return dense_columns(l, a.dense.x, M, first, last, y, stride);
    const Problem p = problem_of(l, M, y, stride);
    if (l.w.axis == 0) {
      const auto group_of = [&](int64_t column) { return (column * l.w.groups + l.w.N - 1) / l.w.N; };
      for (int64_t g = group_of(first); g < group_of(last); ++g) group_columns(l, p, a.dense.x, g);
      return;
    }
    if (a.integers) return multiply(p, &a.quantized, first, last);
    const Kernels& k = kernels();
    k.linear_dense(p, a.dense, first, last, (float*)scratch(4 * k.linear_dense_scratch(p), Scratch::kernel));
  }

  // y [M][columns of all parts] = x times all parts.
  void run(std::atomic<int64_t>& next, const std::vector<Linear>& parts, const float* x, int64_t M, char* memory, float* y) {
    Activations a[3];
    const size_t different = prepare_all(parts, x, M, memory, a);
    const int64_t stride = columns_of(parts);
    int64_t start[3] = {};
    for (size_t i = 1; i < parts.size(); ++i) start[i] = start[i - 1] + parts[i - 1].w.N;
    share_columns(next, parts, a[0], [&](size_t i, int64_t first, int64_t last) {
      columns(parts[i], a[different > 1 ? i : 0], M, first, last, y + start[i], stride);
    });
  }

  // Activations of each part, or one for all where they are quantized alike; how many there are.
  size_t prepare_all(const std::vector<Linear>& parts, const float* x, int64_t M, char*& memory, Activations* a) {
    const auto alike = [&](const Linear& l) {
      const Weight &v = l.w, &w = parts[0].w;
      return !l.dense == !parts[0].dense && l.rotation == parts[0].rotation && l.pre_scale == parts[0].pre_scale &&
             l.digits == parts[0].digits && v.nbits == w.nbits && v.axis == w.axis && v.group_size == w.group_size &&
             v.groups == w.groups && v.table.count == w.table.count && v.table.values == w.table.values;
    };
    const bool one = std::all_of(parts.begin(), parts.end(), alike);
    const size_t count = one ? 1 : parts.size();
    for (size_t i = 0; i < count; ++i) a[i] = prepare(parts[i], x, M, memory);
    return count;
  }

  // Columns of one product, shared out; y [M][N].
  void run(std::atomic<int64_t>& next, const Linear& l, const float* x, int64_t M, char* memory, float* y) {
    const Activations a = prepare(l, x, M, memory);
    team_.share(next, l.w.N, step_of(l, a), [&](int64_t first, int64_t last) { columns(l, a, M, first, last, y, l.w.N); });
  }

  // Bytes of scratch memory for the activations of one group, axis 0.
  static int64_t group_bytes(const Linear& l, int64_t M) { return quantized_bytes(l.w, M, l.digits) + 4 * floats_of(l.w.K); }

  // Rows of a weight that are one piece of work.
  static int64_t step_of(const Linear& l, const Activations& a) {
    return rows_at_a_time(l.w, l.dense || (a.integers && a.quantized.layout == Layout::rows));
  }

 private:
  static void dense_columns(const Linear& l, const float* x, int64_t M, int64_t first, int64_t last, float* y, int64_t stride) {
    const char* const rows = (const char*)l.dense + first * l.w.K * size_of(l.dense_type);
    kernels().dense_rows(x, M, rows, l.dense_type, last - first, l.w.K, y + first, stride);
    for (int64_t m = 0; l.bias && m < M; ++m)
      for (int64_t n = first; n < last; ++n) y[m * stride + n] += l.bias[n];
  }

  // The columns of group g of a weight of axis 0: as integers, or row by row where these do not serve.
  static void group_columns(const Linear& l, const Problem& p, const float* x, int64_t g) {
    const Kernels& k = kernels();
    const int64_t K = l.w.K, bytes = quantized_bytes(l.w, p.M, l.digits);
    char* const memory = scratch(group_bytes(l, p.M), Scratch::group_activations);
    bool integers = uses_integers(l, p.M);
    if (integers) {
      const QuantizedActivations quantized = quantized_in(l.w, p.M, l.digits, memory);
      for (int64_t m = 0; m < p.M && integers; ++m) integers = k.quantize_activations_axis0(x + m * K, l.w, g, m, quantized);
      if (integers) return multiply(p, &quantized, g, g + 1);
    }
    auto* const row = (float*)(memory + bytes);
    for (int64_t n = g; n < l.w.N; n += l.w.groups) {
      k.dequantize_row(l.w, n, row);
      float* const y = (float*)p.y + n;
      if (K % 16 == 0) k.dense_rows(x, p.M, row, DType::f32, 1, K, y, p.y_stride);
      for (int64_t m = 0; m < p.M; ++m) {
        float& sum = y[m * p.y_stride];
        if (K % 16 != 0) sum = std::inner_product(row, row + K, x + m * K, 0.0f);
        if (l.bias) sum += l.bias[n];
      }
    }
  }

  // f(part, first, last) for runs of columns of several products beside each other.
  template <class F>
  void share_columns(std::atomic<int64_t>& next, const std::vector<Linear>& parts, const Activations& a, const F& f) {
    team_.share(next, columns_of(parts), step_of(parts[0], a), [&](int64_t from, int64_t to) {
      for (size_t i = 0; i < parts.size() && to > 0; from -= parts[i].w.N, to -= parts[i].w.N, ++i)
        if (from < parts[i].w.N) f(i, std::max<int64_t>(from, 0), std::min(to, parts[i].w.N));
    });
  }

  Team& team_;
  const Kernels& k_;
  bool failed_ = false;
};

}  // namespace
}  // namespace hqqtensor
