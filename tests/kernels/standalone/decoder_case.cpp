// Decoder layers with random settings: all parts of a layer, several layers, sequences of different lengths.
#include "dispatch/decoder.h"

#include <memory>

#include "weights.h"

namespace hqqtensor {
namespace {

class RandomDecoder {
 public:
  RandomDecoder(Random& r, Buffers& b) : r_(r), b_(b) {
    digits_ = r.chance(4) ? 1 : r.choose({2, 3});
    d_.hidden = 16 * r.from_to(1, 8), d_.kv_heads = r.from_to(1, 2), d_.heads = d_.kv_heads * r.from_to(1, 3);
    d_.head_dim = 16 * r.from_to(1, 3), d_.intermediate = r.from_to(8, 200);
    d_.eps = 1e-5f, d_.scaling = 0.25f, d_.softcap = r.chance(4) ? 20 : 0;
    d_.gate = r.choose({GateFunction::silu, GateFunction::gelu_tanh});
    d_.layers.resize((size_t)r.from_to(1, 3));
    for (DecoderLayer& l : d_.layers) add(l);
    if (r.chance(2)) d_.final_norm = norm(d_.hidden);
  }

  const Decoder& decoder() const { return d_; }

  DecoderStep step() {
    DecoderStep s{};
    s.type = r_.choose({DType::f32, DType::f16, DType::bf16});
    s.batch = r_.from_to(1, 3), s.tokens = r_.from_to(1, 4), s.last_layer = (int64_t)d_.layers.size();
    const int64_t count = s.batch * s.tokens * d_.hidden, width = d_.head_dim - 2 * r_.below(3);
    s.x = random_numbers(r_, b_, s.type, count, -1, 1);
    s.y = b_.take(count * size_of(s.type), size_of(s.type));
    const int64_t angles = s.batch * s.tokens * width;
    s.ropes.push_back({(const float*)random_numbers(r_, b_, DType::f32, angles, -1, 1),
                       (const float*)random_numbers(r_, b_, DType::f32, angles, -1, 1), width});
    bool packed = r_.chance(3);
    for (const DecoderLayer& l : d_.layers) packed = packed && l.window == 0;  // as the operator checks
    int64_t most = 0;
    for (int64_t i = 0; i < s.last_layer * s.batch; ++i) {
      s.caches.push_back(cache(s, packed));
      const LayerCache& c = s.caches.back();
      most = std::max(most, c.packed.tokens() + c.first + c.length + s.tokens);
    }
    if (r_.chance(3)) {
      s.mask_columns = most;
      auto* const mask = b_.take<uint8_t>(s.batch * most);
      for (int64_t i = 0; i < s.batch * most; ++i) mask[i] = !r_.chance(4);
      s.mask = mask;
    }
    return s;
  }

 private:
  const float* norm(int64_t size) { return (const float*)random_numbers(r_, b_, DType::f32, size, 0.5f, 1.5f); }

  Linear linear(int64_t N, int64_t K) {
    Linear l{};
    l.digits = digits_;
    if (K % 16 == 0 && r_.chance(6)) {
      l.w.N = N, l.w.K = K, l.w.axis = 1, l.digits = 3;
      l.dense_type = r_.choose({DType::f32, DType::f16, DType::bf16});
      l.dense = random_numbers(r_, b_, l.dense_type, N * K, -0.1f, 0.1f);
    } else {
      l.w = random_weight(r_, b_, digits_, 1, N, K);
      l.rotation = K % 16 == 0 && r_.chance(4) ? 16 : 0;
    }
    if (r_.chance(4)) l.bias = norm(N);
    if (r_.chance(4)) l.pre_scale = norm(K);
    return l;
  }

  void add(DecoderLayer& l) {
    l.input_norm = norm(d_.hidden), l.mlp_norm = norm(d_.hidden);
    if (r_.chance(3)) l.attention_out_norm = norm(d_.hidden), l.mlp_out_norm = norm(d_.hidden);
    if (r_.chance(3)) l.q_norm = norm(d_.head_dim), l.k_norm = norm(d_.head_dim);
    if (r_.chance(2)) {
      l.qkv.push_back(linear(d_.qkv_rows(), d_.hidden));
    } else {
      l.qkv.push_back(linear(d_.q_rows(), d_.hidden));
      for (int i = 0; i < 2; ++i) l.qkv.push_back(linear(d_.kv_heads * d_.head_dim, d_.hidden));
    }
    l.o = linear(d_.hidden, d_.q_rows());
    Mlp mlp;
    if (r_.chance(2))
      mlp.gate_up.push_back(linear(2 * d_.intermediate, d_.hidden));
    else
      for (int i = 0; i < 2; ++i) mlp.gate_up.push_back(linear(d_.intermediate, d_.hidden));
    mlp.down = linear(d_.hidden, d_.intermediate);
    l.mlps.assign(1, mlp);
    if (r_.chance(3)) {
      l.router.experts = r_.from_to(1, 5), l.router.chosen = r_.from_to(1, l.router.experts);
      l.router.normalized = r_.chance(2);
      l.router.weight = (const float*)random_numbers(r_, b_, DType::f32, l.router.experts * d_.hidden, -1, 1);
      l.mlps.assign((size_t)l.router.experts, mlp);  // of one packing, as they must be
    }
    l.window = r_.chance(3) ? r_.from_to(1, 40) : 0;
  }

  LayerCache cache(const DecoderStep& s, bool packed) {
    LayerCache c{};
    c.length = r_.chance(3) ? r_.from_to(0, 300) : r_.from_to(0, 40);
    const int64_t capacity = c.length + s.tokens, count = d_.kv_heads * capacity * d_.head_dim;
    c.head_stride = capacity * d_.head_dim;
    c.keys = (char*)random_numbers(r_, b_, s.type, count, -1, 1);
    c.values = (char*)random_numbers(r_, b_, s.type, count, -1, 1);
    if (!packed) return c;
    c.packed.blocks = r_.from_to(1, 4), c.packed.block = r_.choose<int64_t>({16, 32, 64});
    c.packed.stride = d_.kv_heads;
    if ((d_.head_dim & (d_.head_dim - 1)) == 0 && r_.chance(2)) {
      c.packed.signs = (const float*)random_numbers(r_, b_, DType::f32, d_.head_dim, 1, 1);
      c.packed.rotated_keys = r_.chance(2), c.packed.rotated_values = r_.chance(2);
    }
    const auto states = [&] {
      auto all = std::make_shared<std::vector<Weight>>();
      for (int64_t i = 0; i < d_.kv_heads * c.packed.blocks; ++i) {
        all->push_back(random_weight(r_, b_, 0, 1, c.packed.block, d_.head_dim));
        all->back().table = {};
        all->back().zero = random_values(r_, b_, DType::f16, all->back().N, all->back().groups, 0, 1);
      }
      return [all](int64_t i) { return (*all)[(size_t)i]; };
    };
    c.packed.keys = states(), c.packed.values = states();
    return c;
  }

  Random& r_;
  Buffers& b_;
  Decoder d_{};
  int digits_;
};

}  // namespace

Result decoder_case(Random& r, Buffers& b) {
  RandomDecoder random(r, b);
  const DecoderStep s = random.step();
  Result out;
  if (!run_decoder(random.decoder(), s)) return out;
  const auto add = [&](const void* data, int64_t count) {
    out.insert(out.end(), (const char*)data, (const char*)data + count * size_of(s.type));
  };
  add(s.y, s.batch * s.tokens * random.decoder().hidden);
  for (const LayerCache& c : s.caches) add(c.keys, c.head_stride), add(c.values, c.head_stride);
  return out;
}

}  // namespace hqqtensor
