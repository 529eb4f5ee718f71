// Attention over a cache is shared out in pieces of its tokens, whose results are put together afterwards.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace hqqtensor {

constexpr int64_t kLeastTokens = 32, kMostTokens = 512;  // of a cache that are one piece of work

// Tokens of a piece where `all` tokens of all heads are to be read by `threads` threads.
inline int64_t piece_size(int64_t all, int64_t threads) {
  return std::clamp((all / (6 * threads) + 31) / 32 * 32, kLeastTokens, kMostTokens);
}

// The pieces of one head as one result, [dim]. A piece is as Attention::out has it, [dim + 2]; pieces are `stride` numbers
// apart. sink: a score that takes part in the softmax and has no value; -infinity where there is none.
inline void join_pieces(const float* pieces, int64_t stride, int64_t count, int64_t dim, float sink, float* out) {
  float largest = sink;
  for (int64_t c = 0; c < count; ++c) {
    const float* const end = pieces + c * stride + dim;
    if (end[1] > 0) largest = std::max(largest, end[0]);
  }
  std::fill_n(out, dim, 0.0f);
  float total = sink == -INFINITY ? 0 : std::exp(sink - largest);
  for (int64_t c = 0; c < count; ++c) {
    const float* const p = pieces + c * stride;
    if (!(p[dim + 1] > 0)) continue;
    const float weight = std::exp(p[dim] - largest);
    total += weight * p[dim + 1];
    for (int64_t j = 0; j < dim; ++j) out[j] += weight * p[j];
  }
  const float inverse = total > 0 ? 1 / total : 0;
  for (int64_t j = 0; j < dim; ++j) out[j] *= inverse;
}

}  // namespace hqqtensor
