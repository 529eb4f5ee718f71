// Every member of the team keeps the residual of all new tokens, and normalizes and quantizes them itself: for a few tokens
// that takes less than to wait for one who does it for all. Shared out are rows of weights and parts of the caches.
#include "dispatch/decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>

#include "dispatch/product.h"
#include "dispatch/scratch.h"
#include "dispatch/team.h"

namespace hqqtensor {
namespace {

constexpr int64_t kLeastTokens = 32, kMostTokens = 512;  // of a cache that are one piece of work
constexpr int64_t kMostPacked = 256;                     // of packed ones, which are made dense in the second level of cache
constexpr int64_t kCountersPerLayer = 6;                 // phases that are shared out

int64_t floats_of(int64_t count) { return (count + 31) / 16 * 16; }

// Columns of one product, or of several that lie beside each other in y.
int64_t columns_of(const std::vector<Linear>& parts) {
  return std::accumulate(parts.begin(), parts.end(), (int64_t)0, [](int64_t n, const Linear& l) { return n + l.w.N; });
}

// Rows of a weight that are one piece of work.
int64_t rows_at_a_time(const Weight& w, bool by_row) {
  return by_row ? std::clamp<int64_t>(65536 / w.K / 8 * 8, 8, 32) : kernels().dense_row_multiple * 8;
}

bool uses_integers(const Linear& l, int64_t M) { return l.w.axis == 1 && integers_serve(l.w, M, l.digits); }

Problem problem_of(const Linear& l, int64_t M, float* y, int64_t y_stride) {
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
    return quantized_bytes(l.w, M, l.digits) + 4 * (floats_of(M * l.w.K) + packed_floats(l, M)) + 64;
  }
  static int64_t packed_floats(const Linear& l, int64_t M) {
    return kernels().pack_activations ? floats_of(kernels().packed_activations_size(M, l.w.K, splits(l, M))) : 0;
  }
  static int splits(const Linear& l, int64_t M) { return splits_of(problem_of(l, M, nullptr, 0), l.digits); }
};

// Bytes of the activations of products that are made together.
int64_t bytes_of(const std::vector<Linear>& parts, int64_t M) {
  return std::accumulate(parts.begin(), parts.end(), (int64_t)0,
                         [M](int64_t n, const Linear& l) { return n + Activations::bytes(l, M); });
}

// Memory that all members see, and the pieces that attention is shared out in.
struct Shared {
  float *qkv, *partial, *o, *h, *down, *scores;
  std::unique_ptr<std::atomic<int64_t>[]> next;
  std::atomic<bool> failed{false};
};

// How the tokens of a layer's cache are shared out: first runs of packed blocks, then the others.
struct Pieces {
  int64_t packed;  // pieces of packed tokens
  int64_t run;     // packed blocks of one
  int64_t first;   // token of the others that is the first one seen
  int64_t size;    // tokens of a piece
  int64_t count;   // of all pieces
};

class Member {
 public:
  Member(const Decoder& d, const DecoderStep& s, Shared& shared, Team& team)
      : d_(d), s_(s), shared_(shared), team_(team), k_(kernels()), M_(s.batch * s.tokens) {}

  void run() {
    if (!reserve()) shared_.failed = true;
    team_.meet();
    if (shared_.failed) return;
    k_.to_float(s_.x, s_.type, M_ * d_.hidden, residual_);
    for (int64_t i = 0; i < s_.last_layer - s_.first_layer && !failed_; ++i) layer((size_t)i);
    failed_ ? (void)(shared_.failed = true) : finish();
  }

  // The i-th layer of this run.
  static const DecoderLayer& layer_of(const Decoder& d, const DecoderStep& s, size_t i) {
    return d.layers[(size_t)s.first_layer + i];
  }

  // Pieces of the cache of the i-th layer, the same for all members.
  static Pieces pieces_of(const Decoder& d, const DecoderStep& s, size_t i, int64_t threads) {
    const int64_t length = s.caches[i].length, window = layer_of(d, s, i).window, total = length + s.tokens;
    const int64_t first = window > 0 ? std::max<int64_t>(0, length - window + 1) : 0, heads = s.batch * d.kv_heads;
    const int64_t even = ((total - first) * heads / (6 * threads) + 31) / 32 * 32;
    const int64_t size = std::clamp(even, kLeastTokens, kMostTokens);
    const PackedCache& packed = s.caches[i].packed;
    const int64_t blocks = std::max<int64_t>(1, packed.block ? kMostPacked / packed.block : 1);
    const int64_t run = std::clamp<int64_t>(packed.blocks * heads / (6 * threads), 1, blocks);
    const int64_t of_packed = (packed.blocks + run - 1) / run;
    return {of_packed, run, first, size, of_packed + (total - first + size - 1) / size};
  }

 private:
  // ---- Memory ----

  bool reserve() noexcept {
    try {
      int64_t activations = 0, widest = std::max({d_.hidden, d_.q_rows(), d_.intermediate}), kernel = 0, most_chosen = 1;
      int64_t most_experts = 0;
      for (const DecoderLayer& l : d_.layers) {
        activations = std::max({activations, bytes_of(l.qkv, M_), Activations::bytes(l.o, M_)});
        const int64_t chosen = l.router.weight ? l.router.chosen : 1;
        const Mlp& mlp = l.mlps[0];
        activations = std::max({activations, M_ * bytes_of(mlp.gate_up, 1) + bytes_of(mlp.gate_up, M_),
                                chosen * M_ * Activations::bytes(mlp.down, 1) + Activations::bytes(mlp.down, M_)});
        for (const Linear* w : products_of(l)) {
          const Problem p = problem_of(*w, M_, nullptr, 0);
          kernel = std::max({kernel, k_.linear_rows_scratch(p, steps_per_row(w->w)), k_.linear_dense_scratch(p),
                             k_.linear_panel ? k_.linear_panel_scratch(p) : 0});
        }
        most_chosen = std::max(most_chosen, chosen), most_experts = std::max(most_experts, l.router.experts);
      }
      const int64_t group = d_.heads / d_.kv_heads;
      const int64_t rows = M_ * most_chosen;
      const int64_t floats = floats_of(M_ * d_.hidden) + floats_of(rows * widest) + 2 * floats_of(group * d_.head_dim) +
                             floats_of(2 * kMostPacked * d_.head_dim) + floats_of(group * padded(kMostTokens)) +
                             floats_of(std::max(kMostTokens, most_experts));
      char* memory = scratch(4 * floats + activations + 4096, Scratch::decoder_member);
      const auto take = [&](int64_t count) {
        float* const at = (float*)memory;
        memory += 4 * floats_of(count);
        return at;
      };
      residual_ = take(M_ * d_.hidden);
      line_ = take(rows * widest);
      query_ = take(group * d_.head_dim);
      head_ = take(d_.head_dim);
      dense_ = take(2 * kMostPacked * d_.head_dim);
      scores_ = take(group * padded(kMostTokens));
      tile_ = take(std::max(kMostTokens, most_experts));
      activations_ = memory;
      scratch(4 * kernel, Scratch::kernel);
      visits_.reserve((size_t)rows);
      inputs_.reserve((size_t)(2 * rows));
      return true;
    } catch (...) {
      return false;
    }
  }

  static std::vector<const Linear*> products_of(const DecoderLayer& l) {
    std::vector<const Linear*> all{&l.o};
    for (const Linear& part : l.qkv) all.push_back(&part);
    for (const Linear& part : l.mlps[0].gate_up) all.push_back(&part);
    all.push_back(&l.mlps[0].down);
    return all;
  }

  // ---- Products ----

  // x, [M][K], for one product. `memory` moves on.
  Activations prepare(const Linear& l, const float* x, int64_t M, char*& memory) {
    Activations a{};
    const int64_t K = l.w.K;
    char* const quantized = memory;
    auto* const floats = (float*)(memory + quantized_bytes(l.w, M, l.digits));
    memory += Activations::bytes(l, M) / 64 * 64;
    if (l.pre_scale) {
      for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < K; ++i) floats[m * K + i] = x[m * K + i] * l.pre_scale[i];
      x = floats;
    }
    a.integers = uses_integers(l, M);
    if (a.integers) {
      a.quantized = quantized_in(l.w, M, l.digits, quantized);
      for (int64_t m = 0; m < M && a.integers; ++m) a.integers = k_.quantize_activations(x + m * K, l.w, m, a.quantized);
      if (a.integers) return a;
    }
    if (l.digits == 1) failed_ = true;  // 8-bit activations are rounded elsewhere where integers do not serve
    a.dense = {.x = x, .stride = K, .splits = Activations::splits(l, M), .packed = nullptr};
    float* const packed = floats + floats_of(M * K);
    if (k_.pack_activations && k_.pack_activations(a.dense, 0, M, K, packed)) a.dense.packed = packed;
    return a;
  }

  static void columns(const Linear& l, const Activations& a, int64_t M, int64_t first, int64_t last, float* y, int64_t stride) {
    const Problem p = problem_of(l, M, y, stride);
    if (a.integers) return multiply(p, &a.quantized, first, last);
    const Kernels& k = kernels();
    k.linear_dense(p, a.dense, first, last, (float*)scratch(4 * k.linear_dense_scratch(p), Scratch::kernel));
  }

  // f(part, first, last) for runs of columns of several products beside each other.
  template <class F>
  void share_columns(std::atomic<int64_t>& next, const std::vector<Linear>& parts, const Activations& a, const F& f) {
    const int64_t step = rows_at_a_time(parts[0].w, a.integers && a.quantized.layout == Layout::rows);
    team_.share(next, columns_of(parts), step, [&](int64_t from, int64_t to) {
      for (size_t i = 0; i < parts.size() && to > 0; from -= parts[i].w.N, to -= parts[i].w.N, ++i)
        if (from < parts[i].w.N) f(i, std::max<int64_t>(from, 0), std::min(to, parts[i].w.N));
    });
  }

  // y [M][columns of all parts] = x times all parts.
  void products(std::atomic<int64_t>& next, const std::vector<Linear>& parts, const float* x, float* y) {
    char* memory = activations_;
    Activations a[3];
    const size_t different = prepare_all(parts, x, M_, memory, a);
    const int64_t stride = columns_of(parts);
    int64_t start[3] = {};
    for (size_t i = 1; i < parts.size(); ++i) start[i] = start[i - 1] + parts[i - 1].w.N;
    share_columns(next, parts, a[0], [&](size_t i, int64_t first, int64_t last) {
      columns(parts[i], a[different > 1 ? i : 0], M_, first, last, y + start[i], stride);
    });
  }

  // Activations of each part, or one for all where they are quantized alike; how many there are.
  size_t prepare_all(const std::vector<Linear>& parts, const float* x, int64_t M, char*& memory, Activations* a) {
    const auto alike = [&](const Linear& l) {
      const Weight &v = l.w, &w = parts[0].w;
      return l.pre_scale == parts[0].pre_scale && l.digits == parts[0].digits && v.nbits == w.nbits && v.axis == w.axis &&
             v.group_size == w.group_size && v.groups == w.groups && v.table.count == w.table.count &&
             v.table.values == w.table.values;
    };
    const bool one = std::all_of(parts.begin(), parts.end(), alike);
    const size_t count = one ? 1 : parts.size();
    for (size_t i = 0; i < count; ++i) a[i] = prepare(parts[i], x, M, memory);
    return count;
  }

  // ---- A layer ----

  std::atomic<int64_t>& counter(size_t i, int phase) { return shared_.next[i * kCountersPerLayer + (size_t)phase]; }

  void norm(const float* weight, const float* x, float* out) {
    for (int64_t m = 0; m < M_; ++m) k_.rms_norm(x + m * d_.hidden, weight, d_.hidden, d_.eps, out + m * d_.hidden);
  }

  // What a block gave is normalized where the family does that, and added to the residual.
  void add(const float* out_norm, const float* x) {
    if (out_norm) norm(out_norm, x, line_), x = line_;
    for (int64_t i = 0; i < M_ * d_.hidden; ++i) residual_[i] += x[i];
  }

  void layer(size_t i) {
    const DecoderLayer& l = layer_of(d_, s_, i);
    norm(l.input_norm, residual_, line_);
    products(counter(i, 0), l.qkv, line_, shared_.qkv);
    team_.meet();
    const Pieces pieces = pieces_of(d_, s_, i, team_.size());
    team_.share(counter(i, 1), s_.batch * d_.kv_heads * pieces.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) attend(i, pieces, item);
    });
    team_.meet();
    join(pieces.count);
    char* memory = activations_;
    const Activations a = prepare(l.o, line_, M_, memory);
    team_.share(counter(i, 2), l.o.w.N, rows_at_a_time(l.o.w, a.integers && a.quantized.layout == Layout::rows),
                [&](int64_t first, int64_t last) { columns(l.o, a, M_, first, last, shared_.o, l.o.w.N); });
    team_.meet();
    add(l.attention_out_norm, shared_.o);
    norm(l.mlp_norm, residual_, line_);
    l.router.weight ? experts(i, l) : mlp(i, l.mlps[0]);
    team_.meet();
    add(l.mlp_out_norm, shared_.down);
  }

  void mlp(size_t i, const Mlp& mlp) {
    char* memory = activations_;
    Activations a[2];
    const size_t different = prepare_all(mlp.gate_up, line_, M_, memory, a);
    const int64_t width = d_.intermediate;
    const Linear &gate = mlp.gate_up.front(), &up = mlp.gate_up.back();
    const int64_t up_row = mlp.gate_up.size() == 1 ? width : 0;  // where rows of up begin in their weight
    // A weight of both writes rows of up behind those of gate.
    float *gates = shared_.h, *ups = up_row ? shared_.h : shared_.h + width;
    const int64_t step = rows_at_a_time(gate.w, a[0].integers && a[0].quantized.layout == Layout::rows);
    team_.share(counter(i, 3), width, step, [&](int64_t first, int64_t last) {
      columns(gate, a[0], M_, first, last, gates, 2 * width);
      columns(up, a[different - 1], M_, up_row + first, up_row + last, ups, 2 * width);
      for (int64_t m = 0; m < M_; ++m) {
        float* const h = shared_.h + m * 2 * width + first;
        k_.gate(d_.gate, h, h + width, last - first, h);
      }
    });
    team_.meet();
    for (int64_t m = 0; m < M_; ++m) std::copy_n(shared_.h + m * 2 * width, width, line_ + m * width);
    memory = activations_;
    const Activations down = prepare(mlp.down, line_, M_, memory);
    team_.share(counter(i, 4), mlp.down.w.N, rows_at_a_time(mlp.down.w, down.integers && down.quantized.layout == Layout::rows),
                [&](int64_t first, int64_t last) { columns(mlp.down, down, M_, first, last, shared_.down, mlp.down.w.N); });
  }

  // ---- Experts ----

  // A token at one of the experts chosen for it.
  struct Visit {
    int64_t token, expert;
    float weight;
  };

  // The visits of all tokens, `chosen` for each, the best first.
  void route(const Router& r, const float* x) {
    visits_.clear();
    for (int64_t m = 0; m < M_; ++m) {
      k_.dot_rows(x + m * d_.hidden, r.weight, r.experts, d_.hidden, tile_);
      const float top = *std::max_element(tile_, tile_ + r.experts);
      double all = 0, kept = 0;
      for (int64_t e = 0; e < r.experts; ++e) all += tile_[e] = std::exp(tile_[e] - top);
      const size_t begin = visits_.size();
      for (int64_t i = 0; i < r.chosen; ++i) {
        const int64_t best = std::max_element(tile_, tile_ + r.experts) - tile_;
        kept += tile_[best];
        visits_.push_back({m, best, tile_[best]});
        tile_[best] = -1;
      }
      for (size_t i = begin; i < visits_.size(); ++i) visits_[i].weight /= (float)(r.normalized ? kept : all);
    }
  }

  void experts(size_t i, const DecoderLayer& l) {
    route(l.router, line_);
    const int64_t width = d_.intermediate, chosen = l.router.chosen, count = M_ * chosen;
    const Mlp& first_mlp = l.mlps[0];
    char* memory = activations_;
    inputs_.clear();
    const size_t parts = first_mlp.gate_up.size();
    for (int64_t m = 0; m < M_; ++m)
      for (const Linear& part : first_mlp.gate_up) inputs_.push_back(prepare(part, line_ + m * d_.hidden, 1, memory));
    const int64_t step = rows_at_a_time(first_mlp.gate_up[0].w, inputs_[0].integers);
    // Rows of all visits, one visit after the other.
    team_.share(counter(i, 3), count * width, step, [&](int64_t from, int64_t to) {
      for (int64_t v = from / width; v * width < to; ++v) {
        const int64_t first = std::max<int64_t>(from - v * width, 0), last = std::min(to - v * width, width);
        const Visit& visit = visits_[(size_t)v];
        const Mlp& mlp = l.mlps[(size_t)visit.expert];
        float* const h = shared_.h + v * 2 * width;
        const Activations* const x = &inputs_[(size_t)visit.token * parts];
        const int64_t up_row = parts == 1 ? width : 0;
        columns(mlp.gate_up[0], x[0], 1, first, last, h, 2 * width);
        columns(mlp.gate_up[parts - 1], x[parts - 1], 1, up_row + first, up_row + last, h + width - up_row, 2 * width);
        k_.gate(d_.gate, h + first, h + width + first, last - first, h + first);
      }
    });
    team_.meet();
    memory = activations_;
    inputs_.clear();
    for (int64_t v = 0; v < count; ++v) {
      std::copy_n(shared_.h + v * 2 * width, width, line_ + v * width);
      inputs_.push_back(prepare(first_mlp.down, line_ + v * width, 1, memory));
    }
    const int64_t rows = std::min(rows_at_a_time(first_mlp.down.w, inputs_[0].integers), kMostTokens);
    team_.share(counter(i, 4), d_.hidden, rows, [&](int64_t from, int64_t to) {
      for (; from < to; from += kMostTokens) {
        const int64_t last = std::min(to, from + kMostTokens);
        for (int64_t v = 0; v < count; ++v) {
          const Visit& visit = visits_[(size_t)v];
          columns(l.mlps[(size_t)visit.expert].down, inputs_[(size_t)v], 1, from, last, tile_ - from, d_.hidden);
          float* const out = shared_.down + visit.token * d_.hidden;
          for (int64_t n = from; n < last; ++n) out[n] = visit.weight * tile_[n - from] + (v % chosen == 0 ? 0 : out[n]);
        }
      }
    });
  }

  // ---- Attention ----

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
    return shared_.partial + ((m * pieces + piece) * d_.heads + head) * (d_.head_dim + 2);
  }

  // One piece of the tokens of one head of keys and values of one sequence. New keys and values in it are written first.
  void attend(size_t i, const Pieces& pieces, int64_t item) {
    const int64_t piece = item % pieces.count, b = item / pieces.count / d_.kv_heads, head = item / pieces.count % d_.kv_heads;
    if (piece < pieces.packed) return attend_packed(i, pieces, piece, b, head);
    const LayerCache& cache = s_.caches[i];
    const DecoderLayer& l = layer_of(d_, s_, i);
    const int64_t dim = d_.head_dim, size = size_of(s_.type);
    const int64_t from = pieces.first + (piece - pieces.packed) * pieces.size;
    const int64_t to = std::min(from + pieces.size, cache.length + s_.tokens);
    const int64_t at = (b * cache.batch_stride + head * cache.head_stride) * size;
    char *keys = cache.keys + at, *values = cache.values + at;
    for (int64_t t = std::max(from, cache.length); t < to; ++t) {
      const int64_t m = b * s_.tokens + t - cache.length;
      const float* const k = shared_.qkv + m * d_.qkv_rows() + d_.q_rows() + head * dim;
      turned(k, l.k_norm, l.rope, m, head_);
      k_.from_float(head_, dim, s_.type, keys + t * dim * size);
      k_.from_float(k + d_.kv_heads * dim, dim, s_.type, values + t * dim * size);
    }
    for (int64_t token = 0; token < s_.tokens; ++token) {
      const int64_t place = cache.length + token;
      const int64_t first = l.window > 0 ? std::max(from, place - l.window + 1) : from, last = std::min(to, place + 1);
      const char *const k = keys + first * dim * size, *const v = values + first * dim * size;
      attend_run(i, pieces, piece, b, head, token, k, v, s_.type, cache.packed_tokens() + cache.first + first, last - first);
    }
  }

  // The same for packed tokens, which are made dense in the cache of this core.
  void attend_packed(size_t i, const Pieces& pieces, int64_t piece, int64_t b, int64_t head) {
    const PackedCache& packed = s_.caches[i].packed;
    const int64_t dim = d_.head_dim, first = piece * pieces.run, last = std::min(first + pieces.run, packed.blocks);
    float *const keys = dense_, *const values = dense_ + kMostPacked * dim;
    for (int64_t block = first; block < last; ++block) {
      const int64_t which = (b * d_.kv_heads + head) * packed.blocks + block, at = (block - first) * packed.block * dim;
      k_.dequantize_rows(packed.keys(which), 0, packed.block, DType::f32, (char*)(keys + at), dim, head_);
      k_.dequantize_rows(packed.values(which), 0, packed.block, DType::f32, (char*)(values + at), dim, head_);
    }
    for (int64_t token = 0; token < s_.tokens; ++token)
      attend_run(i, pieces, piece, b, head, token, keys, values, DType::f32, first * packed.block,
                 (last - first) * packed.block);
  }

  // Attention of one new token over `count` tokens, the first one at `place` of the sequence, into its partial sums.
  void attend_run(size_t i, const Pieces& pieces, int64_t piece, int64_t b, int64_t head, int64_t token, const void* keys,
                  const void* values, DType type, int64_t place, int64_t count) {
    const DecoderLayer& l = layer_of(d_, s_, i);
    const int64_t dim = d_.head_dim, group = d_.heads / d_.kv_heads, m = b * s_.tokens + token;
    float* const out = partial(m, head * group, piece, pieces.count);
    if (count <= 0) {
      for (int64_t g = 0; g < group; ++g) out[g * (dim + 2) + dim + 1] = 0;
      return;
    }
    for (int64_t g = 0; g < group; ++g) {
      turned(shared_.qkv + m * d_.qkv_rows() + (head * group + g) * dim, l.q_norm, l.rope, m, query_ + g * dim);
      for (int64_t j = 0; j < dim; ++j) query_[g * dim + j] *= d_.scaling;
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
  }

  // The pieces of all heads put together, [M][heads * head_dim], into line_.
  void join(int64_t pieces) {
    const int64_t dim = d_.head_dim;
    for (int64_t m = 0; m < M_; ++m)
      for (int64_t head = 0; head < d_.heads; ++head) {
        float *const out = line_ + (m * d_.heads + head) * dim, largest = -INFINITY, total = 0;
        for (int64_t c = 0; c < pieces; ++c) {
          const float* const p = partial(m, head, c, pieces) + dim;
          if (p[1] > 0) largest = std::max(largest, p[0]);
        }
        std::fill_n(out, dim, 0.0f);
        for (int64_t c = 0; c < pieces; ++c) {
          const float* const p = partial(m, head, c, pieces);
          if (!(p[dim + 1] > 0)) continue;
          const float weight = std::exp(p[dim] - largest);
          total += weight * p[dim + 1];
          for (int64_t j = 0; j < dim; ++j) out[j] += weight * p[j];
        }
        const float inverse = total > 0 ? 1 / total : 0;
        for (int64_t j = 0; j < dim; ++j) out[j] *= inverse;
      }
  }

  void finish() {
    if (d_.final_norm && s_.last_layer == (int64_t)d_.layers.size()) norm(d_.final_norm, residual_, residual_);
    const int64_t size = size_of(s_.type), step = (d_.hidden + team_.size() - 1) / team_.size();
    team_.share(counter(s_.caches.size(), 0), d_.hidden, step, [&](int64_t first, int64_t last) {
      for (int64_t m = 0; m < M_; ++m)
        k_.from_float(residual_ + m * d_.hidden + first, last - first, s_.type, (char*)s_.y + (m * d_.hidden + first) * size);
    });
  }

  const Decoder& d_;
  const DecoderStep& s_;
  Shared& shared_;
  Team& team_;
  const Kernels& k_;
  int64_t M_;            // tokens
  bool failed_ = false;  // all members compute the same activations, so they agree
  float *residual_, *line_, *query_, *head_, *dense_, *scores_, *tile_;
  char* activations_;
  std::vector<Visit> visits_;
  std::vector<Activations> inputs_;
};

}  // namespace

bool run_decoder(const Decoder& d, const DecoderStep& s) {
  const int64_t M = s.batch * s.tokens, threads = num_threads();
  int64_t pieces = 1;
  for (size_t i = 0; i < s.caches.size(); ++i)
    for (int64_t t = 1; t <= threads; ++t) pieces = std::max(pieces, Member::pieces_of(d, s, i, t).count);
  int64_t chosen = 1;
  for (const DecoderLayer& l : d.layers)
    if (l.router.weight) chosen = std::max(chosen, l.router.chosen);
  const int64_t sizes[] = {M * d.qkv_rows(), M * pieces * d.heads * (d.head_dim + 2), M * d.hidden,
                           M * chosen * 2 * d.intermediate, M * d.hidden};
  int64_t floats = 0;
  for (const int64_t size : sizes) floats += floats_of(size);
  auto* memory = (float*)scratch(4 * floats, Scratch::decoder);
  Shared shared;
  float** const buffers[] = {&shared.qkv, &shared.partial, &shared.o, &shared.h, &shared.down};
  for (size_t i = 0; i < std::size(sizes); ++i) *buffers[i] = memory, memory += floats_of(sizes[i]);
  shared.next = std::make_unique<std::atomic<int64_t>[]>(s.caches.size() * kCountersPerLayer + 1);
  Team::run([&](Team& team) { Member(d, s, shared, team).run(); });
  return !shared.failed;
}

}  // namespace hqqtensor
