// Attention of a few new tokens over a cache, by the members of a team: pieces of the tokens of each head of keys and values.
#pragma once
#include <algorithm>
#include <cmath>

#include "dispatch/decoder.h"
#include "dispatch/member_products.h"
#include "dispatch/pieces.h"

namespace hqqtensor {
namespace {

// How the tokens of a layer's caches are shared out, of each sequence alike: first runs of packed blocks, then the others.
struct Pieces {
  int64_t run;    // packed blocks of a piece
  int64_t size;   // tokens of a piece
  int64_t count;  // pieces of the longest sequence; those that a shorter one lacks are empty

  // Pieces of packed tokens.
  int64_t packed(const LayerCache& c) const { return (c.packed.blocks + run - 1) / run; }
};

// What a member does of attention.
class MemberAttention {
 public:
  // qkv: [tokens][Decoder::qkv_rows()], what the projections gave. partial: a place for the pieces of all heads. memory: floats
  // of `scratch_floats`. line: [tokens][heads * head_dim], where `join` puts the result.
  MemberAttention(const Decoder& d, const DecoderStep& s, const float* qkv, float* partial, float* memory, float* line)
      : d_(d), s_(s), k_(kernels()), qkv_(qkv), partial_(partial), line_(line) {
    const int64_t group = d.heads / d.kv_heads;
    const auto take = [&](int64_t count) {
      float* const at = memory;
      memory += floats_of(count);
      return at;
    };
    query_ = take(group * d.head_dim);
    head_ = take(d.head_dim);
    dense_ = take(2 * kMostPacked * d.head_dim);
    scores_ = take(group * padded(kMostTokens));
  }

  static int64_t scratch_floats(const Decoder& d) {
    const int64_t group = d.heads / d.kv_heads;
    return floats_of(group * d.head_dim) + floats_of(d.head_dim) + floats_of(2 * kMostPacked * d.head_dim) +
           floats_of(group * padded(kMostTokens));
  }

  // The i-th layer of this run.
  static const DecoderLayer& layer_of(const Decoder& d, const DecoderStep& s, size_t i) {
    return d.layers[(size_t)s.first_layer + i];
  }

  // Pieces of the cache of the i-th layer, the same for all members.
  static Pieces pieces_of(const Decoder& d, const DecoderStep& s, size_t i, int64_t threads) {
    const int64_t window = layer_of(d, s, i).window;
    const auto tokens = [&](const LayerCache& c) { return c.length + s.tokens - first_seen(c, window); };
    int64_t all_tokens = 0, all_blocks = 0, block = 1;
    for (int64_t b = 0; b < s.batch; ++b) {
      const LayerCache& c = s.cache(i, b);
      all_tokens += tokens(c), all_blocks += c.packed.blocks, block = std::max(block, c.packed.block);
    }
    Pieces p{.run = PackedCache::run_of(all_blocks * d.kv_heads, block, threads),
             .size = piece_size(all_tokens * d.kv_heads, threads),
             .count = 0};
    for (int64_t b = 0; b < s.batch; ++b) {
      const LayerCache& c = s.cache(i, b);
      p.count = std::max(p.count, p.packed(c) + (tokens(c) + p.size - 1) / p.size);
    }
    return p;
  }

  // One piece of the tokens of one head of keys and values of one sequence. New keys and values in it are written first.
  void attend(size_t i, const Pieces& pieces, int64_t item) {
    const int64_t piece = item % pieces.count, b = item / pieces.count / d_.kv_heads, head = item / pieces.count % d_.kv_heads;
    const LayerCache& cache = s_.cache(i, b);
    if (piece < pieces.packed(cache)) return attend_packed(i, pieces, piece, b, head);
    const DecoderLayer& l = layer_of(d_, s_, i);
    const int64_t dim = d_.head_dim, size = size_of(s_.type);
    const int64_t from = first_seen(cache, l.window) + (piece - pieces.packed(cache)) * pieces.size;
    const int64_t to = std::min(from + pieces.size, cache.length + s_.tokens);
    const int64_t at = head * cache.head_stride * size;
    char *keys = cache.keys + at, *values = cache.values + at;
    for (int64_t t = std::max(from, cache.length); t < to; ++t) {
      const int64_t m = b * s_.tokens + t - cache.length;
      const float* const k = qkv_ + m * d_.qkv_rows() + d_.q_rows() + head * dim;
      turned(k, l.k_norm, l.rope, m, head_);
      k_.from_float(head_, dim, s_.type, keys + t * dim * size);
      k_.from_float(k + d_.kv_heads * dim, dim, s_.type, values + t * dim * size);
    }
    for (int64_t token = 0; token < s_.tokens; ++token) {
      const int64_t place = cache.length + token;
      const int64_t first = l.window > 0 ? std::max(from, place - l.window + 1) : from, last = std::min(to, place + 1);
      const char *const k = keys + first * dim * size, *const v = values + first * dim * size;
      const int64_t before = cache.packed.tokens() + cache.first;
      attend_run(i, pieces, piece, b, head, token, k, v, s_.type, before + first, last - first, nullptr);
    }
  }

  // The pieces of all heads put together, [M][heads * head_dim], into line_.
  void join(int64_t pieces) {
    const int64_t dim = d_.head_dim;
    for (int64_t m = 0; m < s_.batch * s_.tokens; ++m)
      for (int64_t head = 0; head < d_.heads; ++head)
        join_pieces(partial(m, head, 0, pieces), d_.heads * (dim + 2), pieces, dim, -INFINITY,
                    line_ + (m * d_.heads + head) * dim);
  }

 private:
  // The token in the buffers of a cache that is the first one seen by any new token.
  static int64_t first_seen(const LayerCache& c, int64_t window) {
    return window > 0 ? std::max<int64_t>(0, c.length - window + 1) : 0;
  }

  // A head of a new token, normalized where the family does that and turned, into `out`.
  void turned(const float* head, const float* weight, int64_t rope, int64_t m, float* out) {
    const int64_t dim = d_.head_dim;
    if (weight)
      k_.rms_norm(head, weight, dim, d_.eps, out);
    else
      std::copy_n(head, dim, out);
    const Rope& r = s_.ropes[(size_t)rope];
    const float *cos = r.cos + m * r.width, *sin = r.sin + m * r.width;
    const int64_t half = r.width / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = out[i], b = out[i + half];
      out[i] = a * cos[i] - b * sin[i];
      out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }

  float* partial(int64_t m, int64_t head, int64_t piece, int64_t pieces) {
    return partial_ + ((m * pieces + piece) * d_.heads + head) * (d_.head_dim + 2);
  }

  // The same for packed tokens, which are made dense in the cache of this core.
  void attend_packed(size_t i, const Pieces& pieces, int64_t piece, int64_t b, int64_t head) {
    const PackedCache& packed = s_.cache(i, b).packed;
    const int64_t dim = d_.head_dim, first = piece * pieces.run, last = std::min(first + pieces.run, packed.blocks);
    float *const keys = dense_, *const values = dense_ + kMostPacked * dim;
    packed.make_dense(head, first, last, dim, keys, values, head_);
    for (int64_t token = 0; token < s_.tokens; ++token)
      attend_run(i, pieces, piece, b, head, token, keys, values, DType::f32, first * packed.block,
                 (last - first) * packed.block, &packed);
  }

  // Attention of one new token over `count` tokens, the first one at `place` of the sequence, into its partial sums. packed:
  // where these tokens come from, null for those that are not packed.
  void attend_run(size_t i, const Pieces& pieces, int64_t piece, int64_t b, int64_t head, int64_t token, const void* keys,
                  const void* values, DType type, int64_t place, int64_t count, const PackedCache* packed) {
    const DecoderLayer& l = layer_of(d_, s_, i);
    const int64_t dim = d_.head_dim, group = d_.heads / d_.kv_heads, m = b * s_.tokens + token;
    float* const out = partial(m, head * group, piece, pieces.count);
    if (count <= 0) {
      for (int64_t g = 0; g < group; ++g) out[g * (dim + 2) + dim + 1] = 0;
      return;
    }
    for (int64_t g = 0; g < group; ++g) {
      turned(qkv_ + m * d_.qkv_rows() + (head * group + g) * dim, l.q_norm, l.rope, m, query_ + g * dim);
      for (int64_t j = 0; j < dim; ++j) query_[g * dim + j] *= d_.scaling;
      if (packed) packed->rotate_query(query_ + g * dim, dim);
    }
    k_.attend({.q = query_,
               .heads = group,
               .dim = dim,
               .keys = keys,
               .values = values,
               .type = type,
               .count = count,
               .mask = s_.mask ? s_.mask + b * s_.mask_columns + place : nullptr,
               .softcap = d_.softcap,
               .scores = scores_,
               .out = out});
    for (int64_t g = 0; packed && g < group; ++g) packed->rotate_back(out + g * (dim + 2), dim);
  }

  const Decoder& d_;
  const DecoderStep& s_;
  const Kernels& k_;
  const float* qkv_;
  float *partial_, *line_, *query_, *head_, *dense_, *scores_;
};

}  // namespace
}  // namespace hqqtensor
