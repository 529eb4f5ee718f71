#include "dispatch/linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "dispatch/pages.h"

namespace hqqtensor {
namespace {

constexpr int64_t kRowTokensAlone = 16;  // rows of x for linear_rows before linear_dense, where there is no linear_panel
constexpr int64_t kGroups = 32, kGroupBytes = 256 << 10;  // groups of axis 0 at a time, and room for their activations
constexpr int64_t kBlock = 512;          // rows of x at a time: bounds the scratch memory

struct Prepared {
  const float* x;  // float32, pre-scaled
  int64_t stride;
};

Prepared float_rows(const Problem& p, char* room) {
  const Kernels& k = kernels();
  if (p.x_type == DType::f32 && p.pre_scale == nullptr) return {(const float*)p.x, p.x_stride};
  float* copy = (float*)room;
  over(p.M, 1, p.M * p.w.K, [&](int64_t a, int64_t b) {
    for (int64_t m = a; m < b; ++m) {
      float* to = copy + m * p.w.K;
      k.to_float((const char*)p.x + m * p.x_stride * size_of(p.x_type), p.x_type, p.w.K, to);
      if (p.pre_scale)
        for (int64_t i = 0; i < p.w.K; ++i) to[i] *= p.pre_scale[i];
    }
  });
  return {copy, p.w.K};
}

PanelShape panel_shape(const Weight& w, int64_t M, int digits) {
  if (!kernels().linear_panel) return {0, false, false, kRowTokensAlone, dear(w, digits) ? kRowTokensAlone : INT64_MAX};
  return kernels().panel_shape(w, M, digits);
}

int64_t digit_bytes(const Weight& w, int64_t M, int digits) {
  const int64_t chunks = (w.K + 63) / 64, each = std::max(digits, 2);  // Digits::bytes at most
  return (M * (chunks * each * 64 + 4 * step_entries(w) + 4 * padded(w.axis == 1 ? w.groups : 1)) + 191) / 64 * 64;
}

bool use_rows(const Weight& w, int64_t M, int digits) {
  const PanelShape shape = panel_shape(w, M, digits);
  if (quad_rows(w)) return M <= (shape.row_tokens + 1) / 2;
  return chunk_groups(w) && (M <= shape.row_tokens || (shape.tile == 0 && w.axis == 0 && digits == 1));
}

Digits digits_in(const Weight& w, int64_t M, int digits, char* room) {
  const PanelShape shape = use_rows(w, M, digits) ? PanelShape{} : panel_shape(w, M, digits);
  Digits d{(int8_t*)room, nullptr, nullptr, M, (w.K + 63) / 64, step_entries(w), digits, shape.tile, shape.wide, shape.apart};
  d.step = (float*)(room + M * d.chunks * d.bytes() * 64);
  d.sum = d.step + M * d.entries;
  return d;
}

bool integers_serve(const Weight& w, int64_t M, int digits) {
  if (!integer_codes(w) || !quad_groups(w)) return false;
  const PanelShape shape = panel_shape(w, M, digits);
  return M <= shape.integer_tokens && (shape.tile > 0 || use_rows(w, M, digits));
}

// Rows [first, last); axis 0: the rows of groups [first, last), each with its digits.
void multiply(const Problem& p, const Digits* d, int64_t first, int64_t last) {
  const Kernels& k = kernels();
  if (use_rows(p.w, p.M, d->count))
    return k.linear_rows(p, d, first, last, (float*)scratch(4 * k.linear_rows_scratch(p, d->entries), 1));
  float* room = (float*)scratch(4 * k.linear_panel_scratch(p), 1);
  if (p.w.axis == 1) return k.linear_panel(p, *d, first, last, 1, room);
  for (int64_t g = first; g < last; ++g) k.linear_panel(p, d[g - first], g, p.w.N, p.w.groups, room);
}

// Rows of axis 1 of all parts, one after the other.
void multiply_parts(const Problem* parts, int64_t count, const Digits& d) {
  const Problem& p = *parts;
  int64_t N = 0;
  for (int64_t i = 0; i < count; ++i) N += parts[i].w.N;
  const auto rows = [&](int64_t a, int64_t b) {
    for (int64_t i = 0; i < count && b > 0; a -= parts[i].w.N, b -= parts[i].w.N, ++i)
      if (a < parts[i].w.N) multiply(parts[i], &d, std::max<int64_t>(a, 0), std::min(b, parts[i].w.N));
  };
  if (use_rows(p.w, p.M, d.count))
    in_turns(N, std::clamp<int64_t>(65536 / p.w.K / 8 * 8, 8, 32), N * p.w.K * p.M, rows);
  else
    over(N, 32, N * p.w.K * p.M, rows);
}

// All parts are of axis 1, or there is one.
bool multiply_integers(const Problem* parts, int64_t count, const Prepared& x, int digits, char* room) {
  const Kernels& k = kernels();
  const Problem& p = *parts;
  std::atomic<bool> whole{true};
  if (p.w.axis == 1) {
    const Digits d = digits_in(p.w, p.M, digits, room);
    over(p.M, 1, 4 * p.M * p.w.K, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b && whole; ++m)
        if (!k.prepare(x.x + m * x.stride, p.w, m, d)) whole = false;
    });
    if (whole) multiply_parts(parts, count, d);
    return whole;
  }
  // Groups along rows: their scales belong to the activations, which are made anew for each group; for as many groups at a
  // time as stay in the second level of cache.
  const int64_t bytes = digit_bytes(p.w, p.M, digits);
  const int64_t most = std::clamp<int64_t>(kGroupBytes / bytes, 1, kGroups);
  over(p.w.groups, 1, p.w.N * p.w.K * p.M, [&](int64_t a, int64_t b) {
    const int64_t count = std::min(most, b - a);
    char* own = scratch(bytes * count, 2);
    Digits d[kGroups];
    for (int64_t i = 0; i < count; ++i) d[i] = digits_in(p.w, p.M, digits, own + bytes * i);
    for (int64_t g = a; g < b && whole; g += count) {
      const int64_t end = std::min(g + count, b);
      for (int64_t i = g; i < end && whole; ++i)
        for (int64_t m = 0; m < p.M && whole; ++m)
          if (!k.prepare_axis0(x.x + m * x.stride, p.w, i, m, d[i - g])) whole = false;
      if (whole) multiply(p, d, g, end);
    }
  });
  return whole;
}

// 8-bit activations as floats, in place: what `prepare` does, for products that integer kernels do not serve.
bool round_rows(const Weight& w, int64_t M, float* x) {
  const int64_t run = step_per_group(w) && w.group_size == 128 ? 128 : 64;
  std::atomic<bool> whole{true};
  over(M, 1, 4 * M * w.K, [&](int64_t a, int64_t b) {
    for (int64_t i = a * w.K, end = b * w.K; i < end;) {
      const int64_t stop = std::min(i + run, (i / w.K + 1) * w.K);
      float top = 0;
      bool finite = true;
      for (int64_t k = i; k < stop; ++k) {
        top = std::max(top, std::fabs(x[k]));
        finite = finite && std::isfinite(x[k]);
      }
      if (!finite) whole = false;
      const float inverse = top == 0 ? 0 : 127 / top, step = top / 127;
      for (; i < stop; ++i) x[i] = std::nearbyint(x[i] * inverse) * step;
    }
  });
  return whole;
}

bool run_block(const Problem& p, int digits) {
  const Kernels& k = kernels();
  const bool integers = integers_serve(p.w, p.M, digits);
  const int64_t ints = integers && p.w.axis == 1 ? digit_bytes(p.w, p.M, digits) : 0;
  // Of the digits of 8-bit activations only their product with the step is left, a float32.
  const int parts = digits == 3 || (digits == 1 && p.x_type == DType::f32)                    ? 3
                    : digits == 2 && p.x_type == DType::bf16 && p.pre_scale == nullptr ? 1
                                                                                              : 2;
  const int64_t floats = (p.M * p.w.K + 31) / 16 * 16;
  char* room = scratch(ints + 4 * (floats + (k.pack_tokens ? k.packed_size(p.M, p.w.K, parts) : 0)) + 64, 0);
  Prepared x = float_rows(p, room + ints);
  if (integers && multiply_integers(&p, 1, x, digits, room)) return true;
  if (digits == 1) {
    if (integers || p.w.axis == 0) return false;  // NaN, say; scales of axis 0 belong to the activations before rounding
    if (x.x == p.x)
      for (int64_t m = 0; m < p.M; ++m) std::copy_n(x.x + m * x.stride, p.w.K, (float*)(room + ints) + m * p.w.K);
    if (!round_rows(p.w, p.M, (float*)(room + ints))) return false;
    x = {(float*)(room + ints), p.w.K};
  }
  DenseTokens tokens{x.x, x.stride, parts, nullptr};
  if (k.pack_tokens) {
    float* packed = (float*)(room + ints) + floats;
    std::atomic<bool> whole{true};
    over(p.M, k.pack_step, 4 * p.M * p.w.K, [&](int64_t a, int64_t b) {
      if (whole && !k.pack_tokens(tokens, a, b, p.w.K, packed)) whole = false;
    });
    if (whole) tokens.packed = packed;
  }
  over(p.w.N, k.dense_step, p.w.N * p.w.K * p.M, [&](int64_t a, int64_t b) {
    k.linear_dense(p, tokens, a, b, (float*)scratch(4 * k.linear_dense_scratch(p), 1));
  });
  return true;
}

}  // namespace

char* scratch(int64_t bytes, int slot) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { give_back(); }
    void give_back() {
      if (data) release(data, (size_t)size);
      data = nullptr, size = 0;
    }
  };
  static thread_local Buffer buffers[3];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    b.give_back();
    b.data = allocate((size_t)((bytes + 4095) / 4096 * 4096));
    b.size = (bytes + 4095) / 4096 * 4096;
  }
  return (char*)b.data;
}

bool run_linears(Problem* parts, int64_t count, int digits) {
  const Problem& p = *parts;
  // Digits of tables, which codebooks have of their own, decide how those of the activations are made.
  bool alike = p.w.axis == 1 && p.M <= kBlock && integers_serve(p.w, p.M, digits);
  for (int64_t i = 1; i < count; ++i) alike = alike && parts[i].w.table.count == p.w.table.count;
  if (alike) {
    const int64_t ints = digit_bytes(p.w, p.M, digits);
    char* room = scratch(ints + 4 * (p.M * p.w.K + 16) + 64, 0);
    if (multiply_integers(parts, count, float_rows(p, room + ints), digits, room)) return true;
  }
  for (int64_t i = 0; i < count; ++i)
    if (!run_linear(parts[i], digits)) return false;
  return true;
}

bool run_linear(Problem p, int digits) {
  if (p.w.N == 0) return true;
  const int64_t M = p.M;
  for (int64_t m = 0; m < M; m += kBlock) {
    Problem part = p;
    part.M = std::min(kBlock, M - m);
    part.x = (const char*)p.x + m * p.x_stride * size_of(p.x_type);
    part.y = (char*)p.y + m * p.y_stride * size_of(p.x_type);
    if (!run_block(part, digits)) return false;
  }
  return true;
}

}  // namespace hqqtensor
