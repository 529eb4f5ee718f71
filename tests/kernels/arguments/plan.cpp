// Calls that fit, then changed.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments.h"

namespace fake {
namespace {

Argument tensor(int32_t code, std::vector<int64_t> sizes, double low = -1, double high = 1) {
  Argument a;
  a.tensors.push_back({code, std::move(sizes), {}, low, high, {}});
  return a;
}
Argument none() {
  Argument a;
  a.none = true;
  return a;
}
Argument integer(int64_t value) {
  Argument a;
  a.integer = value;
  return a;
}
Argument real(double value) {
  Argument a;
  a.real = value;
  return a;
}
Argument text(std::string value) {
  Argument a;
  a.text = std::move(value);
  return a;
}
Argument integers(std::vector<int64_t> value) {
  Argument a;
  a.integers = std::move(value);
  return a;
}
Argument list(std::vector<Argument> of) {
  Argument a;
  for (Argument& one : of) a.tensors.push_back(one.tensors[0]);
  return a;
}

struct Shape {
  int64_t N, K, nbits, group_size, axis;
  std::string format;
  std::vector<int64_t> leading;  // dimensions of a stack
};

Shape random_shape(Choices& c, bool stack) {
  Shape s;
  s.N = c.from_to(1, 24), s.K = c.chance(3) ? c.from_to(1, 100) : 8 * c.from_to(1, 16);
  s.nbits = c.choose<int64_t>({4, 1, 2, 3, 5, 6, 7, 8});
  s.group_size = c.choose<int64_t>({32, 8, 16, 20, 64, 5, 1, 128, 1 << 20});
  s.axis = c.chance(3) ? 0 : 1;
  s.format = c.choose<const char*>({"int", "int", "codebook", "known"});
  if (s.format == "known") s.nbits = 4;
  if (stack) s.leading = {c.from_to(1, 4)};
  return s;
}

int32_t number_type(Choices& c) { return c.choose<int32_t>({float32, float16, bfloat16, float64}); }
int32_t served_type(Choices& c) { return c.choose<int32_t>({float32, bfloat16, float16}); }

std::vector<int64_t> with(const std::vector<int64_t>& leading, int64_t rows, int64_t columns) {
  std::vector<int64_t> all = leading;
  all.push_back(rows), all.push_back(columns);
  return all;
}

// Scales or zero points, floating-point or integers of 8 or 4 bits that take two tensors of `meta`.
Argument values(Choices& c, const Shape& s, std::vector<Argument>& meta, double low, double high) {
  const int64_t groups = ((s.axis ? s.K : s.N) - 1) / s.group_size + 1;
  const int64_t rows = s.axis ? s.N : groups, columns = s.axis ? groups : s.K;
  const int64_t kind = c.below(4);
  if (kind < 2) return tensor(number_type(c), with(s.leading, rows, columns), low, high);
  const int64_t meta_rows = c.choose<int64_t>({1, 2, 3});
  meta.push_back(tensor(number_type(c), with(s.leading, meta_rows, columns), 0.001, 0.01));
  meta.push_back(tensor(number_type(c), with(s.leading, meta_rows, columns), 0, 10));
  return tensor(uint8, with(s.leading, rows, kind == 2 ? columns : (columns + 7) / 8 * 4), 0, 255);
}

void add_weight(Choices& c, const Shape& s, Arguments& a) {
  std::vector<Argument> meta;
  a["qdata"] = tensor(uint8, with(s.leading, s.N, (s.K + 7) / 8 * s.nbits), 0, 255);
  a["scale"] = values(c, s, meta, 0.01, 0.1);
  const int64_t entries = (int64_t)1 << s.nbits;
  if (s.format == "int")
    a["zero_point"] = values(c, s, meta, 0, (double)entries);
  else if (s.format == "codebook")
    a["zero_point"] =
        tensor(number_type(c), c.chance(2) ? with(s.leading, c.chance(2) ? s.N : 1, entries) : std::vector<int64_t>{entries});
  else
    a["zero_point"] = none();
  a["meta"] = meta.empty() ? none() : list(meta);
  a["nbits"] = integer(s.nbits), a["format"] = text(s.format), a["group_size"] = integer(s.group_size);
  a["axis"] = integer(s.axis), a["in_features"] = integer(s.K);
  a["act_pre_scale"] = c.chance(3) ? tensor(number_type(c), {s.K}, 0.5, 2) : none();
  a["activation"] = text(c.choose<const char*>({"float", "exact", "high", "int8"}));
  a["bias"] = c.chance(3) ? tensor(number_type(c), {s.N}) : none();
  a["dtype"] = integer(served_type(c));
}

Argument column_of(const std::vector<Arguments>& all, const char* name) {
  Argument column;
  for (const Arguments& one : all) {
    const Argument& a = one.at(name);
    if (a.none) return none();
    column.tensors.push_back(a.tensors[0]);
  }
  return column;
}

Planned product(Choices& c) {
  const std::string op = c.choose<const char*>({"linear", "_cpu_linear", "_linear", "batched_linear", "_cpu_batched_linear",
                                                "grouped_linear", "_cpu_grouped_linear", "linear_many", "dequantize",
                                                "_cpu_dequantize", "dequantize_into", "embedding", "_cpu_embedding"});
  const bool batched = op.find("batched") != std::string::npos, grouped = op.find("grouped") != std::string::npos;
  const bool dense = op.find("dequantize") != std::string::npos;
  const Shape s = random_shape(c, batched || grouped || (dense && c.chance(3)));
  Planned p{op, {}};
  Arguments& a = p.arguments;
  add_weight(c, s, a);
  const int64_t rows = c.chance(5) ? c.from_to(5, 70) : c.from_to(0, 4);
  const int32_t type = served_type(c);
  if (batched)
    a["x"] = tensor(type, {s.leading[0], rows, s.K});
  else if (c.chance(3) && !grouped)
    a["x"] = tensor(type, {c.from_to(1, 3), rows, s.K});
  else
    a["x"] = tensor(type, {rows, s.K});
  if (grouped) {
    a["offsets"] = tensor(c.choose<int32_t>({int32, int64}), {s.leading[0]});
    int64_t last = 0;
    for (int64_t e = 0; e < s.leading[0]; ++e) a["offsets"].tensors[0].numbers.push_back(last = c.from_to(last, rows));
  }
  a["indices"] = tensor(c.choose<int32_t>({int64, int32, uint8}), {rows, c.from_to(1, 3)}, 0, (double)s.N - 1);
  a["out"] = tensor(type, with(s.leading, s.N, s.K));
  if (op != "linear_many") return p;
  std::vector<Arguments> all{a};
  for (int64_t i = c.below(3); i > 0; --i) {
    all.push_back({});
    add_weight(c, s, all.back());
  }
  Argument meta;
  for (const Arguments& one : all)
    meta.tensors.insert(meta.tensors.end(), one.at("meta").tensors.begin(), one.at("meta").tensors.end());
  for (const char* name : {"qdata", "scale", "zero_point", "bias", "act_pre_scale"}) a[name] = column_of(all, name);
  a["meta"] = meta.tensors.empty() ? none() : meta;
  return p;
}

// Packed keys or values of a cache: six tensors, and settings that are those of all.
void add_packed(Choices& c, Arguments& a, int64_t batch, int64_t kv_heads, int64_t dim, size_t caches) {
  a["packed"] = none(), a["packed_settings"] = integers({}), a["signs"] = none();
  if (!c.chance(3)) return;
  const int64_t nbits = c.choose<int64_t>({4, 8, 2}), group = c.choose<int64_t>({16, 32, 64});
  const bool rotated = c.chance(3);
  Argument packed;
  a["packed_settings"] = integers({nbits, group, c.below(2), c.below(2), rotated ? c.below(2) : 0, rotated});
  if (rotated) a["signs"] = tensor(float32, {dim});
  const int64_t blocks = c.from_to(1, 3), block = c.choose<int64_t>({32, 16});
  for (size_t i = 0; i < 2 * caches; ++i) {
    Shape s{block, dim, nbits, group, a["packed_settings"].integers[i % 2 ? 3 : 2], "int", {blocks, batch, kv_heads}};
    const int64_t groups = ((s.axis ? dim : block) - 1) / group + 1;
    const auto shape = with(s.leading, s.axis ? block : groups, s.axis ? groups : dim);
    packed.tensors.push_back(tensor(uint8, with(s.leading, block, (dim + 7) / 8 * nbits), 0, 255).tensors[0]);
    packed.tensors.push_back(tensor(float16, shape, 0.01, 0.1).tensors[0]);
    packed.tensors.push_back(tensor(float16, shape, 0, 10).tensors[0]);
  }
  a["packed"] = packed;
}

Planned attention(Choices& c) {
  Planned p{c.choose<const char*>({"attention", "_cpu_attention"}), {}};
  Arguments& a = p.arguments;
  const int64_t batch = c.from_to(1, 3), kv_heads = c.from_to(1, 2), heads = kv_heads * c.from_to(1, 3),
                tokens = c.from_to(1, 3);
  const int64_t length = c.from_to(1, 40), dim = c.choose<int64_t>({16, 32, 64, 48, 8});
  const int32_t type = served_type(c);
  a["query"] = tensor(type, {batch, heads, tokens, dim});
  a["key"] = tensor(type, {batch, kv_heads, length, dim}), a["value"] = a["key"];
  a["sinks"] = c.chance(3) ? tensor(number_type(c), {heads}) : none();
  a["scaling"] = real(0.25), a["softcap"] = real(c.chance(3) ? 20 : 0);
  add_packed(c, a, batch, kv_heads, dim, 1);
  const int64_t packed = a["packed"].none ? 0 : a["packed"].tensors[0].sizes[0] * a["packed"].tensors[0].sizes[3];
  a["mask"] = c.chance(2) ? tensor(boolean, {c.chance(2) ? batch : 1, 1, tokens, packed + length}, 0, 1) : none();
  return p;
}

Planned solver(Choices& c) {
  Planned p{c.choose<const char*>({"_solve", "_assign", "_solve_levels", "_assign_levels", "_lloyd", "_solve_weighted",
                                   "_feed_back", "_column_spread"}),
            {}};
  Arguments& a = p.arguments;
  const Shape s = random_shape(c, false);
  const int64_t groups = ((s.axis ? s.K : s.N) - 1) / s.group_size + 1;
  const std::vector<int64_t> scales = s.axis ? std::vector<int64_t>{s.N, groups} : std::vector<int64_t>{groups, s.K};
  a["weight"] = tensor(served_type(c), {s.N, s.K});
  a["rounds"] = integer(c.from_to(1, 3));
  a["nbits"] = integer(s.nbits), a["group_size"] = integer(s.group_size), a["axis"] = integer(s.axis);
  a["solver"] = text(c.choose<const char*>({"rtn", "hqq_joint", "hqq"}));
  a["inverse"] = tensor(number_type(c), scales, 1, 20), a["zero_point"] = tensor(number_type(c), scales, 0, 15);
  a["out"] = tensor(uint8, {s.N, (s.K + 7) / 8 * s.nbits}, 0, 255);
  const int64_t count = c.from_to(2, 16), rows = c.chance(3) ? s.N : 1;
  const auto levels = [&](int64_t entries) {
    Argument argument = tensor(number_type(c), rows > 1 ? std::vector<int64_t>{rows, entries} : std::vector<int64_t>{entries});
    return argument;
  };
  a["values"] = levels(count), a["thresholds"] = levels(count - 1), a["codes"] = tensor(uint8, {count}, 0, 15);
  for (int64_t i = 0; i < count; ++i) a["codes"].tensors[0].numbers.push_back(i);
  a["mantissa"] = integer(rows == 1 && c.chance(3) ? c.from_to(0, 8) : -1), a["least"] = real(0.125);
  const int64_t R = rows > 1 ? rows : c.from_to(1, 4), C = c.from_to(1, 5), size = c.from_to(1, 40);
  a["groups"] = tensor(float32, {R, C, size}), a["scales"] = tensor(number_type(c), {R, C}, 0.1, 1);
  a["group"] = tensor(float32, {s.N, size}), a["importance"] = tensor(float32, {size}, 0.5, 1);
  a["upper"] = tensor(float32, {size, size}), a["errors"] = tensor(float32, {s.N, size});
  if (p.op == "_feed_back") {
    a["scale"] = tensor(float32, {s.N}, 0.01, 0.1), a["zero_point"] = tensor(float32, {s.N}, 0, 15);
    a["codes"] = tensor(uint8, {s.N, size}, 0, 15);
  }
  return p;
}

void add_memory(Choices& c, std::vector<Planned>& calls) {
  const auto sizes = [&] { return integers({c.from_to(0, 40), c.from_to(0, 3000)}); };
  const auto call = [&](const char* op, Arguments a) { calls.push_back({op, std::move(a)}); };
  if (c.chance(2)) {
    call("_pool_new", {});
    for (int i = 0; i < 3; ++i)
      call("_pool_empty", {{"pool", integer(-1)}, {"sizes", sizes()}, {"dtype", integer(c.below(kCodes))}});
    call("_pool_delete", {{"pool", integer(-1)}});
  } else if (c.chance(2)) {
    call("_arena_new", {{"bytes", integer(c.from_to(1, 50000))}});
    for (int i = 0; i < 3; ++i) call("_arena_take", {{"arena", integer(-1)}, {"bytes", integer(c.from_to(0, 30000))}});
    call("_arena_delete", {{"arena", integer(-1)}});
  } else {
    call("_empty_packed", {{"sizes", sizes()}});
    call("_set_table", {{"format", text(c.choose<const char*>({"known", "other", ""}))},
                        {"nbits", integer(4)},
                        {"values", tensor(float32, {16})}});
    call("_instruction_set", {});
  }
}

// A decoder put together, two steps of it, and its end.
class DecoderPlan {
 public:
  DecoderPlan(Choices& c, std::vector<Planned>& calls) : c_(c), calls_(calls) {}

  void add() {
    hidden_ = 16 * c_.from_to(1, 3), kv_heads_ = c_.from_to(1, 2), heads_ = kv_heads_ * c_.from_to(1, 2);
    dim_ = 16 * c_.from_to(1, 2), wide_ = 16 * c_.from_to(1, 3), layers_ = c_.from_to(1, 2);
    call("_decoder_new", {{"layers", integer(layers_)},
                          {"hidden", integer(hidden_)},
                          {"heads", integer(heads_)},
                          {"kv_heads", integer(kv_heads_)},
                          {"head_dim", integer(dim_)},
                          {"intermediate", integer(wide_)},
                          {"eps", real(1e-5)},
                          {"scaling", real(0.25)},
                          {"softcap", real(c_.chance(4) ? 20 : 0)},
                          {"gate", integer(c_.below(2))}});
    digits_ = c_.choose<int64_t>({2, 3, 1});
    for (layer_ = 0; layer_ < layers_; ++layer_) add_layer();
    layer_ = 0;
    if (c_.chance(2)) norm("final", hidden_);
    for (int i = 0; i < 2; ++i) run();
    call("_decoder_delete", {{"decoder", integer(-1)}});
  }

 private:
  void call(const char* op, Arguments a) {
    a.emplace("decoder", integer(-1));
    a.emplace("layer", integer(layer_));
    calls_.push_back({op, std::move(a)});
  }
  void norm(const char* role, int64_t size) {
    call("_decoder_norm", {{"role", text(role)}, {"weight", tensor(number_type(c_), {size}, 0.5, 1.5)}});
  }
  void linear(const char* role, int64_t N, int64_t K, int64_t stack = 0) {
    Arguments a;
    if (c_.chance(5)) {
      const auto shape = with(stack ? std::vector<int64_t>{stack} : std::vector<int64_t>{}, N, K);
      a["weight"] = tensor(served_type(c_), shape), a["bias"] = c_.chance(4) ? tensor(number_type(c_), {N}) : none();
      a["role"] = text(role);
      return call("_decoder_dense", a);
    }
    Shape s = random_shape(c_, false);
    s.N = N, s.K = K;
    s.axis = c_.chance(8) ? 0 : 1;
    if (stack) s.leading = {stack};
    add_weight(c_, s, a);
    a["role"] = text(role), a["digits"] = integer(digits_), a["rotation"] = integer(c_.chance(5) ? 16 : 0);
    call("_decoder_linear", a);
  }
  void add_layer() {
    norm("input", hidden_), norm("mlp", hidden_);
    if (c_.chance(3)) norm("attention_out", hidden_), norm("mlp_out", hidden_);
    if (c_.chance(3)) norm("q", dim_), norm("k", dim_);
    if (c_.chance(2)) {
      linear("q", heads_ * dim_, hidden_), linear("k", kv_heads_ * dim_, hidden_), linear("v", kv_heads_ * dim_, hidden_);
    } else {
      linear("qkv", (heads_ + 2 * kv_heads_) * dim_, hidden_);
    }
    linear("o", hidden_, heads_ * dim_);
    if (c_.chance(3)) {
      const int64_t experts = c_.from_to(1, 3);
      linear("experts_gate_up", 2 * wide_, hidden_, experts), linear("experts_down", hidden_, wide_, experts);
      call("_decoder_router", {{"weight", tensor(number_type(c_), {experts, hidden_})},
                               {"chosen", integer(c_.from_to(1, experts))},
                               {"normalized", integer(c_.below(2))}});
    } else {
      if (c_.chance(2))
        linear("gate", wide_, hidden_), linear("up", wide_, hidden_);
      else
        linear("gate_up", 2 * wide_, hidden_);
      linear("down", hidden_, wide_);
    }
    if (c_.chance(3)) call("_decoder_set_layer", {{"window", integer(c_.from_to(0, 20))}, {"rope", integer(0)}});
  }
  void run() {
    const int64_t batch = c_.from_to(1, 3), tokens = c_.from_to(1, 3), length = c_.from_to(0, 20), room = length + tokens;
    const int32_t type = served_type(c_);
    const bool apart = c_.chance(3);  // a cache for each sequence
    const auto caches = (size_t)(layers_ * (apart ? batch : 1));
    Arguments a{{"x", tensor(type, {batch, tokens, hidden_})},
                {"cos", list({tensor(float32, {40 + 3 * 32, dim_})})},
                {"sin", list({tensor(float32, {40 + 3 * 32, dim_})})},
                {"positions", c_.chance(3) ? tensor(int64, {batch, tokens}, 0, 30) : none()},
                {"lengths", integers(std::vector<int64_t>(caches, length))},
                {"firsts", integers(std::vector<int64_t>(caches, c_.chance(3) ? c_.from_to(0, 9) : 0))},
                {"first_layer", integer(0)},
                {"last_layer", integer(layers_)},
                {"verify", integer(c_.below(2))}};
    Argument states;
    for (size_t i = 0; i < caches; ++i)
      states.tensors.push_back(tensor(type, {apart ? 1 : batch, kv_heads_, room, dim_}).tensors[0]);
    a["keys"] = states, a["values"] = states;
    add_packed(c_, a, apart ? 1 : batch, kv_heads_, dim_, caches);
    const int64_t packed = a["packed"].none ? 0 : a["packed"].tensors[0].sizes[0] * a["packed"].tensors[0].sizes[3];
    const int64_t columns = packed + a["firsts"].integers[0] + room;
    a["mask"] = c_.chance(3) && !apart ? tensor(c_.chance(2) ? boolean : int64, {batch, columns}, 0, 1) : none();
    call("_decoder_run", a);
  }

  Choices& c_;
  std::vector<Planned>& calls_;
  int64_t hidden_ = 0, heads_ = 0, kv_heads_ = 0, dim_ = 0, wide_ = 0, layers_ = 0, digits_ = 0, layer_ = 0;
};

// ---- Changes ----

int64_t odd_integer(Choices& c, int64_t value) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  switch (c.below(8)) {
    case 0: return value + 1;
    case 1: return value - 1;
    case 2: return 0;
    case 3: return -1;
    case 4: return c.choose<int64_t>({most, -most - 1, most - 1, most / 2, most - value});
    case 5: return (int64_t)1 << c.below(63);
    case 6: return value * 2;
    default: return c.from_to(0, 300);
  }
}

int64_t odd_size(Choices& c, int64_t size) {
  switch (c.below(6)) {
    case 0: return size + 1;
    case 1: return std::max<int64_t>(0, size - 1);
    case 2: return 0;
    case 3: return 1;
    case 4: return 2 * size;
    default: return (int64_t)1 << c.from_to(33, 61);  // its numbers share memory, as of torch's expand()
  }
}

void change(Choices& c, TensorValue& t) {
  const auto dim = (int64_t)t.sizes.size();
  const int64_t d = dim ? c.below(dim) : 0;
  switch (c.below(8)) {
    case 0: t.code = (int32_t)c.below(kCodes); return;
    case 1:
      if (dim) t.sizes[(size_t)d] = odd_size(c, t.sizes[(size_t)d]);
      return;
    case 2: {  // numbers apart from one another
      t.strides = contiguous(t.sizes);
      for (int64_t i = 0; i <= d && dim; ++i) t.strides[(size_t)i] *= 2;
      return;
    }
    case 3:  // transposed, the same shape
      t.strides = contiguous(t.sizes);
      if (dim >= 2) {
        std::vector<int64_t> turned(t.sizes.rbegin(), t.sizes.rend());
        turned = contiguous(turned);
        t.strides.assign(turned.rbegin(), turned.rend());
      }
      return;
    case 4: t.sizes.insert(t.sizes.begin() + d, c.choose<int64_t>({1, 0, 2})), t.strides.clear(); return;
    case 5:
      if (dim) t.sizes.erase(t.sizes.begin() + d), t.strides.clear();
      return;
    case 6:  // one number for all of a dimension
      if (dim) t.strides = contiguous(t.sizes), t.strides[(size_t)d] = 0;
      return;
    default: t.numbers.assign(1, odd_integer(c, 1)); return;
  }
}

void change(Choices& c, Argument& a) {
  if (c.chance(12)) {
    a.none = !a.none;
  } else if (!a.tensors.empty()) {
    const auto i = (size_t)c.below((int64_t)a.tensors.size());
    switch (c.below(8)) {
      case 0: a.tensors.erase(a.tensors.begin() + (std::ptrdiff_t)i); break;
      case 1: a.tensors.insert(a.tensors.begin() + (std::ptrdiff_t)i, TensorValue(a.tensors[i])); break;
      default: change(c, a.tensors[i]); break;
    }
  } else if (!a.integers.empty()) {
    const auto i = (size_t)c.below((int64_t)a.integers.size());
    if (c.chance(5))
      a.integers.pop_back();
    else
      a.integers[i] = odd_integer(c, a.integers[i]);
  } else {
    a.text = c.choose<const char*>({"", "int", "codebook", "known", "float", "q", "k", "down", "gate_up", "experts_down",
                                    "experts_gate_up", "input", "final", "rtn", "hqq", "\xff\x01"});
    a.real = c.choose<double>({0, -1, NAN, INFINITY, 1e300, 1e-300});
    a.integer = odd_integer(c, a.integer);
  }
}

}  // namespace

std::vector<Planned> plan(Choices& c) {
  std::vector<Planned> calls;
  switch (c.below(8)) {
    case 0:
    case 1:
    case 2: calls.push_back(product(c)); break;
    case 3: calls.push_back(attention(c)); break;
    case 4: calls.push_back(solver(c)); break;
    case 5: add_memory(c, calls); break;
    default: DecoderPlan(c, calls).add(); break;
  }
  for (int64_t i = c.below(4); i > 0; --i) {
    Planned& call = calls[(size_t)c.below((int64_t)calls.size())];
    if (call.arguments.empty()) continue;
    auto argument = call.arguments.begin();
    std::advance(argument, c.below((int64_t)call.arguments.size()));
    change(c, argument->second);
  }
  const auto any = [&] { return calls.begin() + c.below((int64_t)calls.size()); };
  if (calls.size() > 1 && c.chance(6)) calls.erase(any());
  if (calls.size() > 1 && c.chance(6)) {
    const Planned again = *any();
    calls.insert(any(), again);
  }
  return calls;
}

std::vector<Parameter> parameters_of(const std::string& schema) {
  std::vector<Parameter> all;
  size_t at = schema.find('(') + 1;
  const size_t end = schema.find(") ->");
  while (at < end) {
    size_t next = std::min(schema.find(", ", at), end);
    const std::string one = schema.substr(at, next - at);
    size_t gap = one.find(' ');
    const std::string type = one.substr(0, gap);
    const std::string name =
        one.substr(gap + 1, one.find('=') == std::string::npos ? std::string::npos : one.find('=') - gap - 1);
    const char kind = type == "Tensor[]?"  ? 'L'
                      : type == "Tensor[]" ? 'l'
                      : type == "Tensor?"  ? 'T'
                      : type == "int[]"    ? 'n'
                      : type == "str"      ? 's'
                      : type == "float"    ? 'f'
                      : type[0] == 'T'     ? 't'
                                           : 'i';
    all.push_back({name, kind});
    at = next + 2;
  }
  return all;
}

}  // namespace fake
