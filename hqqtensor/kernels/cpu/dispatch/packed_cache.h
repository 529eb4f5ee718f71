// Old keys and values of a cache as packed blocks of tokens, perhaps rotated, which attention reads without writing them dense
// to memory: a run of blocks is made dense in the second level of cache.
#pragma once
#include <algorithm>
#include <functional>

#include "dispatch/hadamard.h"
#include "dispatch/kernels.h"

namespace hqqtensor {

constexpr int64_t kMostPacked = 256;  // packed tokens that are one piece of work, at most

// Those of one sequence in one layer. A block is [block][head_dim]; in memory block 0 of all heads of all sequences comes
// first, then block 1 of them, so that new blocks are added behind.
struct PackedCache {
  int64_t blocks = 0, block = 0;  // how many of a head, and tokens of one
  int64_t stride = 0, first = 0;  // heads of all sequences; the first one of this sequence
  // The weight that block i of all is. It must be safe to call from several threads.
  std::function<Weight(int64_t i)> keys, values;
  // Rotated states are H S x, with S the signs, [head_dim], and H as in `rotate`; null where none are.
  const float* signs = nullptr;
  bool rotated_keys = false, rotated_values = false;

  int64_t tokens() const { return blocks * block; }

  // Blocks that are one piece of work, where all heads have `all` of them.
  static int64_t run_of(int64_t all, int64_t block, int64_t threads) {
    return std::clamp<int64_t>(all / (6 * threads), 1, std::max<int64_t>(1, kMostPacked / std::max<int64_t>(block, 1)));
  }

  // Blocks [from, to) of a head as float32 [tokens][dim]. line: [dim].
  void make_dense(int64_t head, int64_t from, int64_t to, int64_t dim, float* dense_keys, float* dense_values,
                  float* line) const {
    for (int64_t i = from; i < to; ++i) {
      const int64_t which = i * stride + first + head, at = (i - from) * block * dim;
      kernels().dequantize_rows(keys(which), 0, block, DType::f32, (char*)(dense_keys + at), dim, line);
      kernels().dequantize_rows(values(which), 0, block, DType::f32, (char*)(dense_values + at), dim, line);
    }
  }

  // A query becomes what rotated keys are multiplied with.
  void rotate_query(float* query, int64_t dim) const {
    if (!rotated_keys) return;
    for (int64_t i = 0; i < dim; ++i) query[i] *= signs[i];
    rotate(query, dim, dim);
  }

  // A sum of rotated values becomes that of the values.
  void rotate_back(float* sum, int64_t dim) const {
    if (!rotated_values) return;
    rotate(sum, dim, dim);
    for (int64_t i = 0; i < dim; ++i) sum[i] *= signs[i];
  }
};

}  // namespace hqqtensor
