// Calls of the kernels with random settings, shapes and numbers.
#include <stdexcept>

#include "dispatch/attention.h"
#include "dispatch/linear.h"
#include "dispatch/threads.h"
#include "weights.h"

namespace hqqtensor {

Result decoder_case(Random&, Buffers&);
Result solver_case(Random&, Buffers&);

namespace {

// Numbers that no kernel gives: a NaN with all bits set shows a place that was not written.
char* unwritten(Buffers& b, int64_t bytes, int64_t alignment) {
  char* const out = (char*)b.take(bytes, alignment);
  std::memset(out, 0xFF, (size_t)bytes);
  return out;
}

// The rows of y, [rows][columns] of `type` and `stride` numbers apart, all of which must have been written.
void append(Result& to, const char* y, int64_t rows, int64_t columns, int64_t stride, DType type) {
  const int64_t size = size_of(type);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const char* const at = y + (r * stride + c) * size;
      if (std::all_of(at, at + size, [](char byte) { return byte == (char)0xFF; }))
        throw std::runtime_error("row " + std::to_string(r) + ", column " + std::to_string(c) + " was not written");
      to.insert(to.end(), at, at + size);
    }
}

std::vector<float> floats_of_any(const void* data, DType type, int64_t count) {
  std::vector<float> out((size_t)count);
  kernels().to_float(data, type, count, out.data());
  return out;
}

// y against a product in double precision with the dense weights. Loose: tests in Python hold the exact bounds.
void check_product(const Problem& p, int digits) {
  std::vector<float> dense((size_t)p.w.K);
  for (int64_t n = 0; n < p.w.N; ++n) {
    kernels().dequantize_row(p.w, n, dense.data());
    for (int64_t m = 0; m < p.M; ++m) {
      const auto x = floats_of_any((const char*)p.x + m * p.x_stride * size_of(p.x_type), p.x_type, p.w.K);
      const auto y = floats_of_any((const char*)p.y + (m * p.y_stride + n) * size_of(p.x_type), p.x_type, 1);
      double sum = p.bias ? p.bias[n] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < p.w.K; ++k) {
        const double one = (double)dense[(size_t)k] * x[(size_t)k] * (p.pre_scale ? p.pre_scale[k] : 1);
        sum += one, size += std::fabs(one);
      }
      const double bound = (digits == 1 ? 0.1 : p.x_type == DType::f32 ? 1e-4 : 0.03) * (size + 1e-3);
      if (!(std::fabs(y[0] - sum) <= bound))
        throw std::runtime_error("y[" + std::to_string(m) + "][" + std::to_string(n) + "] is " + std::to_string(y[0]) +
                                 ", not " + std::to_string(sum));
    }
  }
}

int digits_for(Random& r, DType type) { return r.chance(4) ? 1 : type == DType::f32 ? 3 : 2; }

Problem random_problem(Random& r, Buffers& b, const Weight& w, DType type) {
  Problem p{};
  p.w = w, p.x_type = type;
  p.M = r.chance(60) ? r.from_to(500, 530) : r.chance(3) ? r.from_to(5, 70) : r.from_to(1, 4);
  p.x_stride = w.K + (r.chance(4) ? r.below(20) : 0), p.y_stride = w.N + (r.chance(4) ? r.below(20) : 0);
  p.x = random_numbers(r, b, type, (p.M - 1) * p.x_stride + w.K, -1, 1);
  if (r.chance(3)) p.bias = (const float*)random_numbers(r, b, DType::f32, w.N, -1, 1);
  if (r.chance(4)) p.pre_scale = (const float*)random_numbers(r, b, DType::f32, w.K, 0.5f, 2);
  p.y = unwritten(b, ((p.M - 1) * p.y_stride + w.N) * size_of(type), size_of(type));
  p.rounded = type == DType::bf16 && r.chance(2);
  return p;
}

Result product_case(Random& r, Buffers& b) {
  const DType type = r.choose({DType::f32, DType::f16, DType::bf16});
  const int digits = digits_for(r, type);
  const Weight w = random_weight(r, b, digits);
  const Problem p = random_problem(r, b, w, type);
  Result out;
  if (!run_linear(p, digits)) return out;
  append(out, (const char*)p.y, p.M, w.N, p.y_stride, type);
  if (p.M * w.N * w.K < 300000) check_product(p, digits);
  return out;
}

Result products_case(Random& r, Buffers& b) {
  const DType type = r.choose({DType::f32, DType::f16, DType::bf16});
  const int digits = digits_for(r, type);
  const Weight w = random_weight(r, b, digits, 1);
  std::vector<Problem> parts((size_t)r.from_to(1, 4), random_problem(r, b, w, type));
  for (Problem& p : parts) {
    p.w.N = r.from_to(1, w.N), p.y_stride = p.w.N;
    p.y = unwritten(b, p.M * p.w.N * size_of(type), size_of(type));
  }
  Result out;
  if (!run_linears(parts.data(), (int64_t)parts.size(), digits)) return out;
  for (const Problem& p : parts) append(out, (const char*)p.y, p.M, p.w.N, p.y_stride, type);
  return out;
}

Result dense_case(Random& r, Buffers& b) {
  const Weight w = random_weight(r, b, 0);
  const DType type = r.choose({DType::f32, DType::f16, DType::bf16});
  const int64_t first = r.below(w.N), last = r.from_to(first + 1, w.N), stride = w.K + (r.chance(4) ? r.below(20) : 0);
  char* const y = unwritten(b, ((last - first - 1) * stride + w.K) * size_of(type), size_of(type));
  kernels().dequantize_rows(w, first, last, type, y, stride, b.take<float>(w.K));
  Result out;
  append(out, y, last - first, w.K, stride, type);
  auto* const row = (float*)unwritten(b, 4 * w.K, 4);
  kernels().dequantize_row(w, first, row);
  append(out, (const char*)row, 1, w.K, w.K, DType::f32);
  return out;
}

Result attention_case(Random& r, Buffers& b) {
  AttentionCall a{};
  a.type = r.choose({DType::f32, DType::f16, DType::bf16});
  a.batch = r.from_to(1, 3), a.kv_heads = r.from_to(1, 3), a.heads = a.kv_heads * r.from_to(1, 5);
  a.tokens = r.from_to(1, 3), a.length = r.chance(4) ? r.from_to(1, 700) : r.from_to(1, 70), a.dim = 16 * r.from_to(1, 8);
  const int64_t size = size_of(a.type), rows = a.batch * a.heads * a.tokens, states = a.batch * a.kv_heads * a.length * a.dim;
  a.q = random_numbers(r, b, a.type, rows * a.dim, -1, 1);
  a.keys = random_numbers(r, b, a.type, states, -1, 1), a.values = random_numbers(r, b, a.type, states, -1, 1);
  a.q_strides[0] = a.heads * a.tokens * a.dim, a.q_strides[1] = a.tokens * a.dim, a.q_strides[2] = a.dim;
  a.key_strides[0] = a.value_strides[0] = a.kv_heads * a.length * a.dim;
  a.key_strides[1] = a.value_strides[1] = a.length * a.dim;
  if (r.chance(2)) {
    uint8_t* const mask = b.take<uint8_t>(a.tokens * a.length);
    for (int64_t i = 0; i < a.tokens * a.length; ++i) mask[i] = !r.chance(3);
    a.mask = mask, a.mask_strides[1] = a.length;
  }
  if (r.chance(4)) a.sinks = (const float*)random_numbers(r, b, DType::f32, a.heads, -1, 1);
  a.scaling = 0.2f, a.softcap = r.chance(4) ? 30 : 0;
  char* const y = unwritten(b, rows * a.dim * size, size);
  a.y = y;
  run_attention(a);
  Result out;
  append(out, y, rows, a.dim, a.dim, a.type);
  return out;
}

Result vector_case(Random& r, Buffers& b) {
  const Kernels& k = kernels();
  const int64_t count = r.from_to(1, 200), dim = 16 * r.from_to(1, 20), rows = r.from_to(1, 10);
  Result out;
  const auto result = [&](int64_t size) { return (float*)unwritten(b, 4 * size, 4); };
  const auto numbers = [&](int64_t size) { return (float*)random_numbers(r, b, DType::f32, size, -3, 3); };
  float* y = result(count);
  const float* const x = numbers(count);
  k.rms_norm(x, numbers(count), count, 1e-5f, y);
  append(out, (const char*)y, 1, count, count, DType::f32);
  y = result(count);
  k.gate(r.choose({GateFunction::silu, GateFunction::gelu_tanh}), x, numbers(count), count, y);
  append(out, (const char*)y, 1, count, count, DType::f32);
  y = result(rows);
  k.dot_rows(numbers(dim), numbers(dim * rows), rows, dim, y);
  append(out, (const char*)y, 1, rows, rows, DType::f32);
  for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
    char* const stored = unwritten(b, count * size_of(type), size_of(type));
    k.from_float(x, count, type, stored);
    append(out, stored, 1, count, count, type);
    y = result(count);
    k.to_float(stored, type, count, y);
    append(out, (const char*)y, 1, count, count, DType::f32);
  }
  return out;
}

}  // namespace

const std::vector<Case> kCases = {
    {"product", product_case},  {"product", product_case},     {"products of one input", products_case},
    {"dense rows", dense_case}, {"attention", attention_case}, {"decoder", decoder_case},
    {"vectors", vector_case},   {"solvers", solver_case},
};

}  // namespace hqqtensor
