// Decoders of models (dispatch/decoder.h) by a number that Python holds, put together projection by projection. A decoder owns
// the tensors that it reads, and notices where one of them has moved.
#include "dispatch/decoder.h"

#include <functional>
#include <memory>
#include <string>

#include "torch/operators.h"
#include "torch/packed_states.h"
#include "torch/registry.h"

namespace hqqtensor {
namespace {

struct Owner {
  Decoder decoder{};
  std::vector<std::unique_ptr<PackedWeights>> weights;
  std::vector<std::unique_ptr<FloatVector>> vectors;
  std::vector<Tensor> tensors;
  std::vector<const void*> places;  // where the data of `tensors` lay

  // A second handle of the tensor, which lives as long as this object.
  Tensor keep(const Tensor& t) {
    if (!t) return {};
    tensors.emplace_back(t.borrow().release(), true);
    places.push_back(t.data());
    return tensors.back().borrow();
  }
  // Whether the data of a tensor lies elsewhere now: share_memory_() moves it, for one.
  bool moved() const {
    for (size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].data() != places[i]) return true;
    return false;
  }
};

Registry<Owner>& decoders() {
  static auto* const all = new Registry<Owner>("decoder");  // outlives whatever Python deletes at its end
  return *all;
}

std::shared_ptr<Owner> find(int64_t id) { return decoders().find(id); }

DecoderLayer& layer_of(Owner& o, int64_t layer) {
  HQQ_CHECK(layer >= 0 && layer < (int64_t)o.decoder.layers.size(), "decoder: there is no layer ", layer);
  return o.decoder.layers[(size_t)layer];
}

const float* vector_of(Owner& o, const Tensor& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  o.vectors.push_back(std::make_unique<FloatVector>(o.keep(t), name, size));
  return o.vectors.back()->data;
}

bool is_stack(std::string_view role) { return role.substr(0, 8) == "experts_"; }

// A stack of experts' projections. expert: one of them.
void place_experts(Decoder& d, DecoderLayer& l, std::string_view role, int64_t count, const Linear& first,
                   const std::function<Linear(int64_t)>& expert) {
  HQQ_CHECK(first.dense || first.w.axis == 1, "decoder: ", role, " must have axis 1");
  const bool down = role == "experts_down", gate_up = role == "experts_gate_up";
  HQQ_CHECK(down || gate_up, "decoder: there is no stack of projections '", role, "'");
  const int64_t N = down ? d.hidden : 2 * d.intermediate, K = down ? d.intermediate : d.hidden;
  HQQ_CHECK(first.w.N == N && first.w.K == K && count >= 1 && (l.mlps.empty() || (int64_t)l.mlps.size() == count),
            "decoder: ", role, " must be [experts, ", N, ", ", K, "], got [", count, ", ", first.w.N, ", ", first.w.K, "]");
  HQQ_CHECK(down || l.mlps.empty() || l.mlps[0].gate_up.empty(), "decoder: a layer has ", role, " already");
  std::vector<Linear> all;
  for (int64_t e = 0; e < count; ++e) {
    all.push_back(expert(e));
    HQQ_CHECK(all.back().w.table.count == first.w.table.count, "decoder: ", role, " must have codebooks of equal digits");
  }
  l.mlps.resize((size_t)count);
  for (int64_t e = 0; e < count; ++e) {
    Mlp& mlp = l.mlps[(size_t)e];
    down ? (void)(mlp.down = all[(size_t)e]) : mlp.gate_up.push_back(all[(size_t)e]);
  }
}

// Checks that a projection has the shape that its role has in this decoder, and puts it there.
void place(Decoder& d, DecoderLayer& l, std::string_view role, const Linear& linear) {
  const int64_t N = linear.w.N, K = linear.w.K;
  struct Role {
    std::string_view name;
    int64_t rows, columns;
    size_t before;  // projections of the same input that come before it
  };
  const int64_t kv_rows = d.kv_heads * d.head_dim;
  const Role roles[] = {
      {"qkv", d.qkv_rows(), d.hidden, 0},    {"q", d.q_rows(), d.hidden, 0},      {"k", kv_rows, d.hidden, 1},
      {"v", kv_rows, d.hidden, 2},           {"o", d.hidden, d.q_rows(), 0},      {"gate_up", 2 * d.intermediate, d.hidden, 0},
      {"gate", d.intermediate, d.hidden, 0}, {"up", d.intermediate, d.hidden, 1}, {"down", d.hidden, d.intermediate, 0}};
  for (const Role& r : roles) {
    if (r.name != role) continue;
    HQQ_CHECK(N == r.rows && K == r.columns, "decoder: ", role, " must be [", r.rows, ", ", r.columns, "], got [", N, ", ", K,
              "]");
    const bool attention = role == "o" || role.front() == 'q' || role == "k" || role == "v";
    const bool alone = role == "o" || role == "down";  // reads an input of its own
    const size_t before = alone ? 0 : attention ? l.qkv.size() : l.mlps.empty() ? 0 : l.mlps[0].gate_up.size();
    HQQ_CHECK(before == r.before, "decoder: ", role, " must be the ", (int64_t)r.before + 1, ". projection of its input, got ",
              (int64_t)before, " before it");
    if (!attention && l.mlps.empty()) l.mlps.emplace_back();
    if (alone)
      (attention ? l.o : l.mlps[0].down) = linear;
    else
      (attention ? l.qkv : l.mlps[0].gate_up).push_back(linear);
    return;
  }
  fail("decoder: there is no projection '", role, "'");
}

int64_t columns_of(const std::vector<Linear>& parts) {
  int64_t sum = 0;
  for (const Linear& part : parts) sum += part.w.N;
  return sum;
}

void check_complete(const Decoder& d) {
  const auto complete = [&](const Mlp& m) { return columns_of(m.gate_up) == 2 * d.intermediate && m.down.w.N; };
  for (const DecoderLayer& l : d.layers)
    HQQ_CHECK(l.input_norm && l.mlp_norm && columns_of(l.qkv) == d.qkv_rows() && l.o.w.N &&
                  (int64_t)l.mlps.size() == (l.router.weight ? l.router.experts : 1) &&
                  std::all_of(l.mlps.begin(), l.mlps.end(), complete),
              "decoder: a layer lacks a norm, a projection or its router");
}

// Rows of a table of cosines or sines, float32 [positions, width], at the places of the new tokens: [batch][tokens][width].
// False where the table is too short.
bool pick_rows(const Tensor& table, const std::vector<int64_t>& places, int64_t head_dim, std::vector<float>& out) {
  HQQ_CHECK(table.dim() == 2 && table.size(1) <= head_dim && table.size(1) % 2 == 0 && table.scalar() == Scalar::float32 &&
                table.is_contiguous() && table.is_cpu(),
            "decoder: cosines and sines must be contiguous float32 [positions, up to ", head_dim, "], got ", table);
  const int64_t width = table.size(1);
  const auto* rows = (const float*)table.data();
  for (const int64_t place : places) {
    if (place < 0 || place >= table.size(0)) return false;
    out.insert(out.end(), rows + place * width, rows + (place + 1) * width);
  }
  return true;
}

// Places of the new tokens of each sequence: of position_ids [batch or 1, tokens], or those behind the tokens of the caches,
// of which sequence b has lengths[b].
std::vector<int64_t> places_of(const Tensor& position_ids, int64_t tokens, const std::vector<int64_t>& lengths) {
  std::vector<int64_t> all, given;
  const auto batch = (int64_t)lengths.size();
  if (position_ids) {
    const bool fits = position_ids.dim() == 2 && position_ids.size(1) == tokens && is_integer(position_ids.scalar()) &&
                      (position_ids.size(0) == batch || position_ids.size(0) == 1);
    HQQ_CHECK(fits, "decoder: position_ids must be integers [", batch, ", ", tokens, "], got ", position_ids);
    given = integers_of(position_ids);
  } else {
    for (const int64_t length : lengths)
      for (int64_t t = 0; t < tokens; ++t) given.push_back(length + t);
  }
  for (int64_t i = 0; i < batch * tokens; ++i) all.push_back(given[(size_t)i % given.size()]);
  return all;
}

// An attention mask [batch, columns] as a byte for each token; empty where all are seen.
std::vector<uint8_t> bytes_of_mask(const Tensor& mask, int64_t batch, int64_t columns) {
  if (!mask) return {};
  const bool is_bool = mask.scalar() == Scalar::boolean;
  HQQ_CHECK(mask.dim() == 2 && mask.size(0) == batch && mask.size(1) == columns &&
                (is_bool || mask.scalar() == Scalar::int64) && mask.is_contiguous() && mask.is_cpu(),
            "decoder: mask must be contiguous bool or int64 [", batch, ", ", columns, "], got ", mask);
  std::vector<uint8_t> out((size_t)(batch * columns));
  bool all = true;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = is_bool ? ((const uint8_t*)mask.data())[i] : ((const int64_t*)mask.data())[i] != 0;
    all = all && out[i];
  }
  return all ? std::vector<uint8_t>() : out;
}

// The last place in a sequence: a limit, so that sums of places do not overflow.
constexpr int64_t kLastPlace = int64_t(1) << 40;

// That of sequence b of `batch` whose keys and values lie in the same two tensors.
LayerCache cache_of(const Decoder& d, const Tensor& keys, const Tensor& values, int64_t b, int64_t batch, int64_t tokens,
                    Scalar scalar, int64_t length, int64_t first) {
  for (const Tensor* t : {&keys, &values}) {
    const bool fits = t->dim() == 4 && t->size(0) == batch && t->size(1) == d.kv_heads && t->size(3) == d.head_dim &&
                      t->scalar() == scalar && t->is_cpu() && t->stride(3) == 1 && t->stride(2) == d.head_dim;
    HQQ_CHECK(fits, "decoder: a cache must be [", batch, ", ", d.kv_heads, ", capacity, ", d.head_dim,
              "] of the input's dtype, with whole heads, got ", *t);
    HQQ_CHECK(length >= 0 && length <= t->size(2) - tokens, "decoder: a cache of ", t->size(2), " tokens has no room for ",
              tokens, " behind ", length);
  }
  HQQ_CHECK(first >= 0 && first <= kLastPlace, "decoder: the first token of a cache must have place 0 to ", kLastPlace,
            ", got ", first);
  HQQ_CHECK(keys.stride(0) == values.stride(0) && keys.stride(1) == values.stride(1),
            "decoder: keys and values must have the same strides");
  const int64_t at = b * keys.stride(0) * size_of(*dtype_of(scalar));
  return {(char*)keys.mutable_data() + at, (char*)values.mutable_data() + at, keys.stride(1), length, first, {}};
}

}  // namespace

bool decoder_new(Call& c) {
  auto owner = std::make_shared<Owner>();
  Decoder& d = owner->decoder;
  const int64_t layers = c.integer();
  d.hidden = c.integer(), d.heads = c.integer(), d.kv_heads = c.integer(), d.head_dim = c.integer();
  d.intermediate = c.integer();
  d.eps = (float)c.real(), d.scaling = (float)c.real(), d.softcap = (float)c.real();
  d.gate = c.integer() ? GateFunction::gelu_tanh : GateFunction::silu;
  constexpr int64_t most = 1 << 24;
  for (const int64_t size : {layers, d.hidden, d.heads, d.kv_heads, d.head_dim, d.intermediate})
    HQQ_CHECK(size >= 1 && size <= most, "decoder: sizes must be 1 to ", most, ", got ", size);
  HQQ_CHECK(layers <= 1 << 16, "decoder: layers must be 1 to ", (int64_t)1 << 16, ", got ", layers);
  HQQ_CHECK(d.heads % d.kv_heads == 0, "decoder: ", d.heads, " heads do not share ", d.kv_heads, " of keys and values");
  HQQ_CHECK(d.head_dim % 16 == 0, "decoder: head_dim must be a multiple of 16, got ", d.head_dim);
  d.layers.resize((size_t)layers);
  c.give(decoders().add(std::move(owner)));
  return true;
}

bool decoder_delete(Call& c) {
  decoders().remove(c.integer());
  return true;
}

bool decoder_set_layer(Call& c) {
  const auto owner = find(c.integer());
  DecoderLayer& l = layer_of(*owner, c.integer());
  const int64_t window = c.integer(), rope = c.integer();
  HQQ_CHECK(window >= 0 && rope >= 0, "decoder: window and rope must not be negative, got ", window, " and ", rope);
  l.window = window, l.rope = rope;
  return true;
}

bool decoder_norm(Call& c) {
  const auto owner = find(c.integer());
  Decoder& d = owner->decoder;
  const int64_t layer = c.integer();
  const std::string_view role = c.text();
  const Tensor weight = c.tensor();
  const auto put = [&](const float*& to, int64_t size) { to = vector_of(*owner, weight, "a norm's weight", size); };
  if (role == "final") {
    put(d.final_norm, d.hidden);
    return true;
  }
  DecoderLayer& l = layer_of(*owner, layer);
  if (role == "input") return put(l.input_norm, d.hidden), true;
  if (role == "attention_out") return put(l.attention_out_norm, d.hidden), true;
  if (role == "mlp") return put(l.mlp_norm, d.hidden), true;
  if (role == "mlp_out") return put(l.mlp_out_norm, d.hidden), true;
  if (role == "q") return put(l.q_norm, d.head_dim), true;
  if (role == "k") return put(l.k_norm, d.head_dim), true;
  fail("decoder: there is no norm '", role, "'");
}

bool decoder_linear(Call& c) {
  const auto owner = find(c.integer());
  const int64_t layer = c.integer();
  const std::string_view role = c.text();
  PackedArguments a;
  read_packed(c, a);
  const Tensor bias = c.optional_tensor(), pre_scale = c.optional_tensor();
  read_settings(c, a);
  const int64_t digits = c.integer(), rotation = c.integer();
  HQQ_CHECK(digits >= 1 && digits <= 3, "decoder: digits must be 1 to 3, got ", digits);
  HQQ_CHECK(knows_format(a.format, a.nbits), "decoder: there is no kernel for format '", a.format, "'");
  a.qdata = owner->keep(a.qdata), a.scale = owner->keep(a.scale), a.zero = owner->keep(a.zero);
  for (Tensor& t : a.meta) t = owner->keep(t);
  const bool stack = is_stack(role);
  owner->weights.push_back(std::make_unique<PackedWeights>(a, stack ? 3 : 2, (int)digits));
  const PackedWeights& w = *owner->weights.back();
  Linear linear{w.count() ? w.at(0) : Weight{},
                vector_of(*owner, bias, "bias", w.N()),
                vector_of(*owner, pre_scale, "act_pre_scale", w.K()),
                (int)digits,
                rotation,
                nullptr,
                DType::f32};
  HQQ_CHECK(rotation >= 0 && (rotation & (rotation - 1)) == 0 && (rotation == 0 || w.K() % rotation == 0),
            "decoder: rotation must be 0 or a power of two that divides ", w.K(), ", got ", rotation);
  HQQ_CHECK(linear.w.axis == 1 || digits > 1, "decoder: 8-bit activations need axis 1");
  DecoderLayer& l = layer_of(*owner, layer);
  const auto expert = [&](int64_t e) {
    Linear one = linear;
    one.w = w.at(e);
    return one;
  };
  stack ? place_experts(owner->decoder, l, role, w.count(), linear, expert) : place(owner->decoder, l, role, linear);
  return true;
}

bool decoder_dense(Call& c) {
  const auto owner = find(c.integer());
  const int64_t layer = c.integer();
  const std::string_view role = c.text();
  const Tensor given = c.tensor(), bias = c.optional_tensor();
  const bool stack = is_stack(role);
  const auto type = dtype_of(given.scalar());
  HQQ_CHECK(type && given.dim() == (stack ? 3 : 2) && given.is_contiguous() && given.is_cpu() && given.numel() &&
                given.size(-1) % 16 == 0,
            "decoder: a dense ", role, " must be contiguous floating-point [", stack ? "experts, " : "",
            "N, K] with K a multiple of 16, got ", given);
  const Tensor weight = owner->keep(given);
  const int64_t N = weight.size(-2), K = weight.size(-1);
  Linear linear{};
  linear.w.N = N, linear.w.K = K, linear.w.axis = 1, linear.digits = 3;
  linear.bias = vector_of(*owner, bias, "bias", N);
  linear.dense = weight.data(), linear.dense_type = *type;
  DecoderLayer& l = layer_of(*owner, layer);
  const auto expert = [&](int64_t e) {
    Linear one = linear;
    one.dense = (const char*)linear.dense + e * N * K * size_of(*type);
    return one;
  };
  stack ? place_experts(owner->decoder, l, role, weight.size(0), linear, expert) : place(owner->decoder, l, role, linear);
  return true;
}

bool decoder_router(Call& c) {
  const auto owner = find(c.integer());
  Decoder& d = owner->decoder;
  DecoderLayer& l = layer_of(*owner, c.integer());
  const Tensor weight = c.tensor();
  const int64_t chosen = c.integer();
  const bool normalized = c.integer() != 0;
  HQQ_CHECK(weight.dim() == 2 && weight.size(1) == d.hidden && d.hidden % 16 == 0, "decoder: a router must be [experts, ",
            d.hidden, "], a multiple of 16, got ", weight);
  const int64_t experts = weight.size(0);
  HQQ_CHECK(chosen >= 1 && chosen <= experts, "decoder: ", chosen, " of ", experts, " experts cannot be chosen");
  owner->tensors.push_back(converted(weight, Scalar::float32));
  owner->places.push_back(owner->tensors.back().data());
  l.router = {(const float*)owner->places.back(), experts, chosen, normalized};
  return true;
}

bool decoder_run(Call& c) {
  const auto owner = find(c.integer());
  const Decoder& d = owner->decoder;
  const Tensor x = c.tensor();
  const auto cos = c.tensors(), sin = c.tensors(), keys = c.tensors(), values = c.tensors();
  const Tensor positions = c.optional_tensor(), mask = c.optional_tensor();
  const auto lengths = c.integers(), firsts = c.integers();
  const int64_t first_layer = c.integer(), last_layer = c.integer();
  const bool verify = c.integer() != 0;
  PackedStates packed(c, d.head_dim);
  check_complete(d);
  if (verify && owner->moved()) return false;
  const auto type = dtype_of(x.scalar());
  HQQ_CHECK(type && x.dim() == 3 && x.size(2) == d.hidden && x.is_contiguous() && x.is_cpu() && x.numel(),
            "decoder: input must be a contiguous floating-point [batch, tokens, ", d.hidden, "], got ", x);
  HQQ_CHECK(first_layer >= 0 && first_layer < last_layer && last_layer <= (int64_t)d.layers.size(), "decoder: layers ",
            first_layer, " to ", last_layer, " of ", (int64_t)d.layers.size());
  const auto layers = (size_t)(last_layer - first_layer);
  const size_t caches = keys.size();  // one of all sequences for each layer, or one for each sequence
  HQQ_CHECK(caches == layers || caches == layers * (size_t)x.size(0), "decoder: ", (int64_t)layers, " layers of ", x.size(0),
            " sequences need a cache for each layer, or for each layer and sequence, got ", (int64_t)caches);
  HQQ_CHECK(values.size() == caches && lengths.size() == caches && firsts.size() == caches,
            "decoder: as many values, lengths and first places as keys are needed, got ", (int64_t)values.size(), ", ",
            (int64_t)lengths.size(), " and ", (int64_t)firsts.size(), " for ", (int64_t)caches);
  HQQ_CHECK(!cos.empty() && cos.size() == sin.size(), "decoder: as many sines as cosines are needed");
  DecoderStep s{.x = x.data(),
                .y = nullptr,
                .type = *type,
                .batch = x.size(0),
                .tokens = x.size(1),
                .first_layer = first_layer,
                .last_layer = last_layer,
                .ropes = {},
                .caches = {},
                .mask = nullptr,
                .mask_columns = 0};
  HQQ_CHECK(!packed || packed.count() == caches, "decoder: ", (int64_t)caches, " caches have packed states of ",
            (int64_t)packed.count());
  const int64_t together = caches == layers ? s.batch : 1;  // sequences in one cache
  std::vector<int64_t> ends((size_t)s.batch);               // places behind the tokens of each sequence's caches
  for (size_t j = 0; j < caches; ++j) {
    const size_t i = j * (size_t)together / (size_t)s.batch;
    const DecoderLayer& layer = d.layers[(size_t)first_layer + i];
    HQQ_CHECK(layer.rope < (int64_t)cos.size(), "decoder: layer ", (int64_t)i, " needs more cosines and sines");
    HQQ_CHECK(!packed || layer.window == 0, "decoder: layers with a window have no packed states");
    PackedCache old;
    if (packed) old = packed.of(j, together, d.kv_heads);
    for (int64_t b = 0; b < together; ++b) {
      LayerCache cache = cache_of(d, keys[j], values[j], b, together, s.tokens, x.scalar(), lengths[j], firsts[j]);
      cache.packed = old, cache.packed.first = b * d.kv_heads;
      int64_t& end = ends[s.caches.size() % (size_t)s.batch];
      end = std::max(end, cache.packed.tokens() + cache.first + cache.length);
      s.caches.push_back(std::move(cache));
    }
  }
  const auto places = places_of(positions, s.tokens, ends);
  std::vector<std::vector<float>> angles(2 * cos.size());
  for (size_t i = 0; i < cos.size(); ++i) {
    HQQ_CHECK(cos[i].dim() == sin[i].dim() && cos[i].size(-1) == sin[i].size(-1),
              "decoder: cosines and sines of one shape are needed");
    if (!pick_rows(cos[i], places, d.head_dim, angles[2 * i]) || !pick_rows(sin[i], places, d.head_dim, angles[2 * i + 1]))
      return false;
    s.ropes.push_back({angles[2 * i].data(), angles[2 * i + 1].data(), cos[i].size(1)});
  }
  HQQ_CHECK(!mask || together == s.batch, "decoder: sequences with caches of their own have no mask");
  s.mask_columns = ends[0] + s.tokens;
  const auto seen = bytes_of_mask(mask, s.batch, s.mask_columns);
  if (!seen.empty()) s.mask = seen.data();
  Tensor y = empty(x.sizes(), x.scalar());
  s.y = y.mutable_data();
  if (!run_decoder(d, s)) return false;
  c.give(std::move(y));
  return true;
}

}  // namespace hqqtensor
