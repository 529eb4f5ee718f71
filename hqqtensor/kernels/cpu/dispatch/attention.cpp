#include "dispatch/attention.h"

#include "dispatch/pieces.h"
#include "dispatch/scratch.h"
#include "dispatch/threads.h"

namespace hqqtensor {
namespace {

// How the tokens of each head are shared out: runs of packed blocks, then pieces of the others.
struct Shares {
  int64_t run, size;    // packed blocks, and tokens, of a piece
  int64_t runs, count;  // pieces that are packed, and all
};

// Memory of one thread: queries of a group of heads, their scores, and packed states made dense.
struct Memory {
  float *queries, *scores, *line, *keys, *values;

  static int64_t floats(const AttentionCall& a) {
    const int64_t group = a.heads / a.kv_heads;
    return padded(group * a.dim) + padded(group * padded(kMostTokens)) + padded(a.dim) +
           (a.packed.blocks ? 2 * padded(kMostPacked * a.dim) : 0);
  }
  explicit Memory(const AttentionCall& a) {
    const int64_t group = a.heads / a.kv_heads;
    queries = (float*)scratch(4 * floats(a), Scratch::decoder_member);
    scores = queries + padded(group * a.dim);
    line = scores + padded(group * padded(kMostTokens));
    keys = line + padded(a.dim);
    values = keys + padded(kMostPacked * a.dim);
  }
};

// One piece of the tokens of one head of keys and values of one sequence, for all new tokens, into `partial`.
void attend(const AttentionCall& a, const Shares& shares, int64_t item, float* partial, const Memory& memory) {
  const Kernels& k = kernels();
  const int64_t piece = item % shares.count, b = item / shares.count / a.kv_heads, head = item / shares.count % a.kv_heads;
  const int64_t group = a.heads / a.kv_heads, bytes = size_of(a.type);
  const bool is_packed = piece < shares.runs;
  const void *keys = memory.keys, *values = memory.values;
  int64_t place = piece * shares.run * a.packed.block, count = 0;
  if (is_packed) {
    const int64_t from = piece * shares.run, to = std::min(from + shares.run, a.packed.blocks);
    a.packed.make_dense(b * a.kv_heads + head, from, to, a.dim, memory.keys, memory.values, memory.line);
    count = (to - from) * a.packed.block;
  } else {
    const int64_t first = (piece - shares.runs) * shares.size;
    keys = (const char*)a.keys + (b * a.key_strides[0] + head * a.key_strides[1] + first * a.dim) * bytes;
    values = (const char*)a.values + (b * a.value_strides[0] + head * a.value_strides[1] + first * a.dim) * bytes;
    place = a.packed.tokens() + first, count = std::min(shares.size, a.length - first);
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = b * a.q_strides[0] + (head * group + g) * a.q_strides[1] + t * a.q_strides[2];
      float* const query = memory.queries + g * a.dim;
      k.to_float((const char*)a.q + at * bytes, a.type, a.dim, query);
      for (int64_t i = 0; i < a.dim; ++i) query[i] *= a.scaling;
      if (is_packed) a.packed.rotate_query(query, a.dim);
    }
    float* const out = partial + (((b * a.tokens + t) * shares.count + piece) * a.heads + head * group) * (a.dim + 2);
    k.attend({.q = memory.queries,
              .heads = group,
              .dim = a.dim,
              .keys = keys,
              .values = values,
              .type = is_packed ? DType::f32 : a.type,
              .count = count,
              .mask = a.mask ? a.mask + b * a.mask_strides[0] + t * a.mask_strides[1] + place : nullptr,
              .softcap = a.softcap,
              .scores = memory.scores,
              .out = out});
    for (int64_t g = 0; is_packed && g < group; ++g) a.packed.rotate_back(out + g * (a.dim + 2), a.dim);
  }
}

}  // namespace

void run_attention(const AttentionCall& a) {
  const int64_t rows = a.batch * a.tokens * a.heads, work = a.batch * a.kv_heads, threads = num_threads();
  Shares shares{};
  shares.run = PackedCache::run_of(a.packed.blocks * work, a.packed.block, threads);
  shares.size = piece_size(a.length * work, threads);
  shares.runs = (a.packed.blocks + shares.run - 1) / shares.run;
  shares.count = shares.runs + (a.length + shares.size - 1) / shares.size;
  const int64_t count = shares.count, row = a.dim + 2;
  auto* const partial = (float*)scratch(4 * rows * count * row, Scratch::decoder);
  const int64_t products = 2 * a.batch * a.tokens * a.heads * (a.packed.tokens() + a.length) * a.dim;
  parallel_over_dynamic(work * count, 1, products, [&](int64_t first, int64_t last) {
    const Memory memory(a);
    for (int64_t item = first; item < last; ++item) attend(a, shares, item, partial, memory);
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
