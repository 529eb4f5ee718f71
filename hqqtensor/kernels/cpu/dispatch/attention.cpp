#include "dispatch/attention.h"

#include "dispatch/pieces.h"
#include "dispatch/scratch.h"
#include "dispatch/threads.h"

namespace hqqtensor {
namespace {

// Memory of one thread: queries of a group of heads, and their scores.
int64_t member_floats(const AttentionCall& a) {
  const int64_t group = a.heads / a.kv_heads;
  return padded(group * a.dim) + padded(group * padded(kMostTokens));
}

// One piece of the tokens of one head of keys and values of one sequence, for all new tokens, into `partial`.
void attend(const AttentionCall& a, int64_t size, int64_t count, int64_t item, float* partial, float* memory) {
  const Kernels& k = kernels();
  const int64_t piece = item % count, b = item / count / a.kv_heads, head = item / count % a.kv_heads;
  const int64_t group = a.heads / a.kv_heads, bytes = size_of(a.type), first = piece * size;
  const char* const keys = (const char*)a.keys + (b * a.key_strides[0] + head * a.key_strides[1] + first * a.dim) * bytes;
  const char* const values =
      (const char*)a.values + (b * a.value_strides[0] + head * a.value_strides[1] + first * a.dim) * bytes;
  float *const queries = memory, *const scores = memory + padded(group * a.dim);
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = b * a.q_strides[0] + (head * group + g) * a.q_strides[1] + t * a.q_strides[2];
      k.to_float((const char*)a.q + at * bytes, a.type, a.dim, queries + g * a.dim);
    }
    for (int64_t i = 0; i < group * a.dim; ++i) queries[i] *= a.scaling;
    k.attend({.q = queries,
              .heads = group,
              .dim = a.dim,
              .keys = keys,
              .values = values,
              .type = a.type,
              .count = std::min(size, a.length - first),
              .mask = a.mask ? a.mask + b * a.mask_strides[0] + t * a.mask_strides[1] + first : nullptr,
              .softcap = a.softcap,
              .scores = scores,
              .out = partial + (((b * a.tokens + t) * count + piece) * a.heads + head * group) * (a.dim + 2)});
  }
}

}  // namespace

void run_attention(const AttentionCall& a) {
  const int64_t rows = a.batch * a.tokens * a.heads, work = a.batch * a.kv_heads, threads = num_threads();
  const int64_t size = piece_size(a.length * work, threads), count = (a.length + size - 1) / size, row = a.dim + 2;
  auto* const partial = (float*)scratch(4 * rows * count * row, Scratch::decoder);
  const int64_t products = 2 * a.batch * a.tokens * a.heads * a.length * a.dim;
  parallel_over_dynamic(work * count, 1, products, [&](int64_t first, int64_t last) {
    auto* const memory = (float*)scratch(4 * member_floats(a), Scratch::decoder_member);
    for (int64_t item = first; item < last; ++item) attend(a, size, count, item, partial, memory);
  });
  parallel_over(rows, 1, rows * count * a.dim, [&](int64_t first, int64_t last) {
    auto* const line = (float*)scratch(4 * a.dim, Scratch::decoder_member);
    for (int64_t i = first; i < last; ++i) {
      const int64_t token = i / a.heads, head = i % a.heads;
      const float* const from = partial + (token * count * a.heads + head) * row;
      join_pieces(from, a.heads * row, count, a.dim, a.sinks ? a.sinks[head] : -INFINITY, line);
      kernels().from_float(line, a.dim, a.type, (char*)a.y + i * a.dim * size_of(a.type));
    }
  });
}

}  // namespace hqqtensor
