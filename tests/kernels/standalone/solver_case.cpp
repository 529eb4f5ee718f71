// Blocks of groups through the solvers, and rows of weights to codes.
#include "weights.h"

namespace hqqtensor {

Result solver_case(Random& r, Buffers& b) {
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, size = r.from_to(1, 130);
  const int nbits = (int)r.from_to(1, 8);
  Result out;
  const auto numbers = [&](int64_t count) { return (float*)random_numbers(r, b, DType::f32, count, -1, 1); };
  const auto add = [&](const void* data, int64_t bytes) {
    out.insert(out.end(), (const char*)data, (const char*)data + bytes);
  };
  float *const inverse = b.take<float>(lanes), *const zero = b.take<float>(lanes);

  k.extremes(numbers(size), size, &inverse[0], &zero[0]);
  add(inverse, 4), add(zero, 4);
  k.solve_block(r.choose({Solver::rtn, Solver::joint}), numbers(size * lanes), size, nbits, inverse, zero);
  add(inverse, 4 * lanes), add(zero, 4 * lanes);
  auto* const importance = (float*)random_numbers(r, b, DType::f32, size, 0.5f / (float)size, 1.5f / (float)size);
  k.solve_weighted_block(numbers(size * lanes), importance, size, nbits, inverse, zero);
  add(inverse, 4 * lanes), add(zero, 4 * lanes);
  const int rounds = 3;
  std::vector<double> totals((size_t)rounds);
  k.hqq_block(numbers(size * lanes), size, r.from_to(1, lanes), nbits, rounds, inverse, zero, totals.data());
  add(inverse, 4 * lanes), add(zero, 4 * lanes);

  auto* const scale = (float*)random_numbers(r, b, DType::f32, lanes, 0.01f, 0.1f);
  float *const codes = b.take<float>(size * lanes), *const errors = b.take<float>(size * lanes);
  k.feed_back_block(numbers(size * lanes), numbers(size * size), size, size, nbits, scale, zero, codes, errors);
  add(codes, 4 * size * lanes), add(errors, 4 * size * lanes);

  const int64_t K = r.from_to(1, 400), rows = r.from_to(1, 20);
  auto* const sums = numbers(K);
  auto* const inverse_columns = (float*)random_numbers(r, b, DType::f32, K, 0.5f, 2);
  const DType type = r.choose({DType::f32, DType::f16, DType::bf16});
  k.spread_rows(random_numbers(r, b, type, rows * K, -1, 1), type, rows, K * size_of(type), K, 0.5f, inverse_columns, sums);
  add(sums, 4 * K);

  Levels levels{};
  levels.symmetric = true, levels.mantissa = -1, levels.first = -1, levels.last = 1;
  for (int i = 0; i < 16; ++i) levels.values[i] = (float)(2 * i - 15) / 15, levels.codes[i] = (uint8_t)i;
  for (int i = 0; i < 32; ++i) levels.thresholds[i] = i < 15 ? (float)(2 * i - 14) / 15 : INFINITY;
  k.solve_levels(levels, r.choose({Solver::rtn, Solver::joint}), numbers(size * lanes), size, inverse);
  add(inverse, 4 * lanes);
  double error = 0;
  std::vector<double> top(16), bottom(16);
  k.lloyd_block(levels, numbers(size * lanes), size, r.from_to(1, lanes), scale, &error, top.data(), bottom.data());
  add(scale, 4 * lanes), add(&error, 8);

  const int axis = (int)r.below(2);
  const int64_t group_size = r.from_to(1, 140), count = axis ? (K - 1) / group_size + 1 : K;
  const auto* const row_inverse = (const float*)random_numbers(r, b, DType::f32, count, 1, 20);
  const auto* const row_zero = (const float*)random_numbers(r, b, DType::f32, count, 0, (float)((1 << nbits) - 1));
  for (const Levels* of : {(const Levels*)nullptr, (const Levels*)&levels}) {
    const int bits = of ? 4 : nbits;
    const int64_t bytes = (K + 7) / 8 * bits;
    auto* const packed = b.take<uint8_t>(bytes);
    std::memset(packed, 0xEE, (size_t)bytes);
    k.assign_row(of, numbers(K), row_inverse, row_zero, K, bits, group_size, axis, packed);
    add(packed, bytes);
  }
  return out;
}

}  // namespace hqqtensor
