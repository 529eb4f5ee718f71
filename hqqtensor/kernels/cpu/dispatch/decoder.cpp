// Every member of the team keeps the residual of all new tokens, and normalizes and quantizes them itself: for a few tokens
// that takes less than to wait for one who does it for all. Shared out are rows of weights and parts of the caches.
#include "dispatch/decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>

#include "dispatch/decoder_attention.h"
#include "dispatch/member_products.h"
#include "dispatch/scratch.h"
#include "dispatch/team.h"

namespace hqqtensor {
namespace {

constexpr int64_t kTile = 512;            // columns of an expert that are made at a time, at most
constexpr int64_t kCountersPerLayer = 6;  // phases that are shared out

// Memory that all members see, a counter for each phase that is shared out, and whether one of them failed.
struct Shared {
  float *qkv, *partial, *o, *h, *down;
  std::unique_ptr<std::atomic<int64_t>[]> next;
  std::atomic<bool> failed{false};
};

class Member {
 public:
  Member(const Decoder& d, const DecoderStep& s, Shared& shared, Team& team)
      : d_(d), s_(s), shared_(shared), team_(team), k_(kernels()), products_(team), M_(s.batch * s.tokens) {}

  void run() {
    if (!reserve()) shared_.failed = true;
    team_.meet();
    if (shared_.failed) return;
    k_.to_float(s_.x, s_.type, M_ * d_.hidden, residual_);
    for (int64_t i = 0; i < s_.last_layer - s_.first_layer && !products_.failed(); ++i) layer((size_t)i);
    products_.failed() ? (void)(shared_.failed = true) : finish();
  }

 private:
  // ---- Memory ----

  bool reserve() noexcept {
    try {
      int64_t activations = 0, widest = std::max({d_.hidden, d_.q_rows(), d_.intermediate}), kernel = 0, most_chosen = 1;
      int64_t most_experts = 0, group = 0;
      for (const DecoderLayer& l : d_.layers) {
        activations = std::max({activations, bytes_of(l.qkv, M_), Activations::bytes(l.o, M_)});
        const int64_t chosen = l.router.weight ? l.router.chosen : 1;
        const Mlp& mlp = l.mlps[0];
        activations = std::max({activations, M_ * bytes_of(mlp.gate_up, 1) + bytes_of(mlp.gate_up, M_),
                                chosen * M_ * Activations::bytes(mlp.down, 1) + Activations::bytes(mlp.down, M_)});
        for (const Linear* w : products_of(l)) {
          if (w->dense) continue;
          if (w->w.axis == 0) group = std::max(group, MemberProducts::group_bytes(*w, M_));
          const Problem p = problem_of(*w, M_, nullptr, 0);
          kernel = std::max({kernel, k_.linear_rows_scratch(p, steps_per_row(w->w)), k_.linear_dense_scratch(p),
                             k_.linear_panel ? k_.linear_panel_scratch(p) : 0});
        }
        most_chosen = std::max(most_chosen, chosen), most_experts = std::max(most_experts, l.router.experts);
      }
      const int64_t rows = M_ * most_chosen, attention = MemberAttention::scratch_floats(d_);
      const int64_t floats = floats_of(M_ * d_.hidden) + floats_of(rows * widest) + floats_of(attention) +
                             floats_of(std::max(kTile, most_experts));
      char* memory = scratch(4 * floats + activations + 4096, Scratch::decoder_member);
      const auto take = [&](int64_t count) {
        float* const at = (float*)memory;
        memory += 4 * floats_of(count);
        return at;
      };
      residual_ = take(M_ * d_.hidden);
      line_ = take(rows * widest);
      attention_.emplace(d_, s_, shared_.qkv, shared_.partial, take(attention), line_);
      tile_ = take(std::max(kTile, most_experts));
      activations_ = memory;
      scratch(4 * kernel, Scratch::kernel);
      scratch(group, Scratch::group_activations);
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
    const DecoderLayer& l = MemberAttention::layer_of(d_, s_, i);
    norm(l.input_norm, residual_, line_);
    products_.run(counter(i, 0), l.qkv, line_, M_, activations_, shared_.qkv);
    team_.meet();
    const Pieces pieces = MemberAttention::pieces_of(d_, s_, i, team_.size());
    team_.share(counter(i, 1), s_.batch * d_.kv_heads * pieces.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) attention_->attend(i, pieces, item);
    });
    team_.meet();
    attention_->join(pieces.count);
    products_.run(counter(i, 2), l.o, line_, M_, activations_, shared_.o);
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
    const size_t different = products_.prepare_all(mlp.gate_up, line_, M_, memory, a);
    const int64_t width = d_.intermediate;
    const Linear &gate = mlp.gate_up.front(), &up = mlp.gate_up.back();
    if (gate.w.axis == 0 || up.w.axis == 0) return mlp_by_groups(i, mlp);
    const int64_t up_row = mlp.gate_up.size() == 1 ? width : 0;  // where rows of up begin in their weight
    // A weight of both writes rows of up behind those of gate.
    float *gates = shared_.h, *ups = up_row ? shared_.h : shared_.h + width;
    team_.share(counter(i, 3), width, MemberProducts::step_of(gate, a[0]), [&](int64_t first, int64_t last) {
      MemberProducts::columns(gate, a[0], M_, first, last, gates, 2 * width);
      MemberProducts::columns(up, a[different - 1], M_, up_row + first, up_row + last, ups, 2 * width);
      for (int64_t m = 0; m < M_; ++m) {
        float* const h = shared_.h + m * 2 * width + first;
        k_.gate(d_.gate, h, h + width, last - first, h);
      }
    });
    team_.meet();
    for (int64_t m = 0; m < M_; ++m) std::copy_n(shared_.h + m * 2 * width, width, line_ + m * width);
    products_.run(counter(i, 4), mlp.down, line_, M_, activations_, shared_.down);
  }

  // The same where the columns of a piece of work do not lie beside each other.
  void mlp_by_groups(size_t i, const Mlp& mlp) {
    const int64_t width = d_.intermediate;
    products_.run(counter(i, 3), mlp.gate_up, line_, M_, activations_, shared_.h);
    team_.meet();
    for (int64_t m = 0; m < M_; ++m) {
      const float* const h = shared_.h + m * 2 * width;
      k_.gate(d_.gate, h, h + width, width, line_ + m * width);
    }
    products_.run(counter(i, 4), mlp.down, line_, M_, activations_, shared_.down);
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
      for (const Linear& part : first_mlp.gate_up) inputs_.push_back(products_.prepare(part, line_ + m * d_.hidden, 1, memory));
    const int64_t step = MemberProducts::step_of(first_mlp.gate_up[0], inputs_[0]);
    // Rows of all visits, one visit after the other.
    team_.share(counter(i, 3), count * width, step, [&](int64_t from, int64_t to) {
      for (int64_t v = from / width; v * width < to; ++v) {
        const int64_t first = std::max<int64_t>(from - v * width, 0), last = std::min(to - v * width, width);
        const Visit& visit = visits_[(size_t)v];
        const Mlp& mlp = l.mlps[(size_t)visit.expert];
        float* const h = shared_.h + v * 2 * width;
        const Activations* const x = &inputs_[(size_t)visit.token * parts];
        const int64_t up_row = parts == 1 ? width : 0;
        MemberProducts::columns(mlp.gate_up[0], x[0], 1, first, last, h, 2 * width);
        MemberProducts::columns(mlp.gate_up[parts - 1], x[parts - 1], 1, up_row + first, up_row + last, h + width - up_row,
                                2 * width);
        k_.gate(d_.gate, h + first, h + width + first, last - first, h + first);
      }
    });
    team_.meet();
    memory = activations_;
    inputs_.clear();
    for (int64_t v = 0; v < count; ++v) {
      std::copy_n(shared_.h + v * 2 * width, width, line_ + v * width);
      inputs_.push_back(products_.prepare(first_mlp.down, line_ + v * width, 1, memory));
    }
    const int64_t rows = std::min(MemberProducts::step_of(first_mlp.down, inputs_[0]), kTile);
    team_.share(counter(i, 4), d_.hidden, rows, [&](int64_t from, int64_t to) {
      for (; from < to; from += kTile) {
        const int64_t last = std::min(to, from + kTile);
        for (int64_t v = 0; v < count; ++v) {
          const Visit& visit = visits_[(size_t)v];
          MemberProducts::columns(l.mlps[(size_t)visit.expert].down, inputs_[(size_t)v], 1, from, last, tile_ - from,
                                  d_.hidden);
          float* const out = shared_.down + visit.token * d_.hidden;
          for (int64_t n = from; n < last; ++n) out[n] = visit.weight * tile_[n - from] + (v % chosen == 0 ? 0 : out[n]);
        }
      }
    });
  }

  void finish() {
    if (d_.final_norm && s_.last_layer == (int64_t)d_.layers.size()) norm(d_.final_norm, residual_, residual_);
    const int64_t size = size_of(s_.type), step = (d_.hidden + team_.size() - 1) / team_.size();
    team_.share(counter((size_t)(s_.last_layer - s_.first_layer), 0), d_.hidden, step, [&](int64_t first, int64_t last) {
      for (int64_t m = 0; m < M_; ++m)
        k_.from_float(residual_ + m * d_.hidden + first, last - first, s_.type, (char*)s_.y + (m * d_.hidden + first) * size);
    });
  }

  const Decoder& d_;
  const DecoderStep& s_;
  Shared& shared_;
  Team& team_;
  const Kernels& k_;
  MemberProducts products_;
  std::optional<MemberAttention> attention_;
  int64_t M_;  // tokens
  float *residual_, *line_, *tile_;
  char* activations_;
  std::vector<Visit> visits_;
  std::vector<Activations> inputs_;
};

}  // namespace

bool run_decoder(const Decoder& d, const DecoderStep& s) {
  const int64_t M = s.batch * s.tokens, threads = num_threads();
  const auto layers = (size_t)(s.last_layer - s.first_layer);
  int64_t pieces = 1;
  for (size_t i = 0; i < layers; ++i)
    for (int64_t t = 1; t <= threads; ++t) pieces = std::max(pieces, MemberAttention::pieces_of(d, s, i, t).count);
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
  shared.next = std::make_unique<std::atomic<int64_t>[]>(layers * kCountersPerLayer + 1);
  Team::run([&](Team& team) { Member(d, s, shared, team).run(); });
  return !shared.failed;
}

}  // namespace hqqtensor
