// One input of the fuzzer: calls of operators, each of which must end in an error with a text or in results, the same wherever
// buffers lie and whatever their surroundings hold; products must be those of the dense weight. Anything else ends the program.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "arguments.h"
#include "harness.h"
#include "standalone.h"
#include "torch/standalone.h"

namespace {

// ---- Memory of C++ ----

constexpr size_t kMostAtOnce = (size_t)1 << 27;      // refused, as a machine would refuse terabytes
constexpr int64_t kMostTogether = (int64_t)1 << 28;  // a list that grows step by step to this size is a finding
int64_t allocated = 0;

}  // namespace

void* operator new(size_t size) {
  if (size > kMostAtOnce) throw std::bad_alloc();
  auto* const out = (size_t*)std::malloc(size + 16);
  if (!out) throw std::bad_alloc();
  *out = size;
  if ((allocated += (int64_t)size) > kMostTogether) {
    std::fprintf(stderr, "memory: more than %lld bytes at once\n", (long long)kMostTogether);
    std::abort();
  }
  return out + 2;
}
void operator delete(void* data) noexcept {
  if (!data) return;
  auto* const start = (size_t*)data - 2;
  allocated -= (int64_t)*start;
  std::free(start);
}
void operator delete(void* data, size_t) noexcept { operator delete(data); }

namespace fake {
namespace {

// ---- Torch's form of arguments ----

using Filler = hqqtensor::Random;

void fill(const TensorValue& v, Tensor& t, Filler& r) {
  const int64_t count = t.numel();
  if (count == 0) return;
  // All numbers that the strides reach, in order of memory: those between them too.
  int64_t reached = 1;
  for (int64_t d = 0; d < t.dim; ++d) reached += (t.sizes[d] - 1) * t.strides[d];
  auto* to = (char*)t.storage->data;
  for (int64_t i = 0; i < reached; ++i, to += size_of(t.code)) {
    const bool given = i < (int64_t)v.numbers.size();
    const double real = given ? (double)v.numbers[(size_t)i] : r.real((float)v.low, (float)v.high);
    const int64_t whole = given ? v.numbers[(size_t)i] : r.from_to((int64_t)v.low, (int64_t)v.high);
    store_number(t.code, to, real, whole);
  }
}

constexpr int64_t kShared = 1 << 20;  // dimensions beyond this share their numbers, as after torch's expand()

// The tensor, with a dimension less here and there where torch would not take the product of the sizes; one number where its
// memory would be too much.
Tensor* tensor_of(TensorValue v, Filler& r) {
  __int128 count = 1;
  bool shared = false;
  for (int64_t& size : v.sizes) {
    if (count * std::max<int64_t>(size, 1) > ((__int128)1 << 62)) size = 1;
    count *= std::max<int64_t>(size, 1);
    shared = shared || size > kShared;
  }
  if (v.strides.size() != v.sizes.size()) v.strides = contiguous(v.sizes);
  if (shared) {
    std::vector<int64_t> real = v.sizes;
    for (int64_t& size : real) size = size > kShared ? 1 : size;
    v.strides = contiguous(real);
    for (size_t d = 0; d < real.size(); ++d) v.strides[d] = v.sizes[d] > kShared ? 0 : v.strides[d];
  }
  Tensor* t = new_tensor(v.code, v.sizes, v.strides);
  if (!t) t = new_tensor(v.code, {1}, {1});
  fill(v, *t, r);
  return t;
}

uint64_t new_list(std::vector<uint64_t> items) {
  count_handle(1);
  return (uint64_t)new std::vector<uint64_t>(std::move(items));
}

// Of the numbers of tensor i of an argument: the same in every call with an argument of that name.
Filler filler_of(const std::string& name, uint64_t i) {
  uint64_t seed = i;
  for (const char letter : name) seed = seed * 131 + (uint8_t)letter;
  return Filler(seed);
}

uint64_t word_of(const std::string& name, const Argument& a, char kind) {
  const auto item = [&](size_t i) {
    Filler random = filler_of(name, i);
    return (uint64_t)tensor_of(i < a.tensors.size() ? a.tensors[i] : TensorValue{}, random);
  };
  const auto one = [&] { return item(0); };
  const auto list = [&] {
    std::vector<uint64_t> items;
    for (size_t i = 0; i < a.tensors.size(); ++i) items.push_back(item(i));
    return new_list(items);
  };
  switch (kind) {
    case 't': return one();
    case 'T': return a.none || a.tensors.empty() ? 0 : (uint64_t)new uint64_t(one());
    case 'l': return list();
    case 'L': return a.none ? 0 : (uint64_t)new uint64_t(list());
    case 'n': return new_list({a.integers.begin(), a.integers.end()});
    case 's': count_handle(1); return (uint64_t)new std::string(a.text);
    case 'f': {
      uint64_t word;
      std::memcpy(&word, &a.real, 8);
      return word;
    }
    default: return (uint64_t)a.integer;
  }
}

// ---- Calls ----

std::string described(const Planned& call) {
  std::string all;
  const auto numbers = [](const std::vector<int64_t>& list) {
    std::string one = "[";
    for (const int64_t number : list) one += (one.size() > 1 ? ", " : "") + std::to_string(number);
    return one + "]";
  };
  for (const Parameter& p : parameters_of(operators()[call.op].schema)) {
    const auto argument = call.arguments.find(p.name);
    if (argument == call.arguments.end()) continue;
    const Argument& a = argument->second;
    all += "  " + p.name + " =";
    if (a.none) all += " none";
    for (const TensorValue& t : a.tensors)
      all += " dtype " + std::to_string(t.code) + " " + numbers(t.sizes) +
             (t.strides.empty() ? "" : " by " + numbers(t.strides)) + (t.numbers.empty() ? "" : " of " + numbers(t.numbers));
    if (p.kind == 'i') all += " " + std::to_string(a.integer);
    if (p.kind == 'f') all += " " + std::to_string(a.real);
    if (p.kind == 's') all += " '" + a.text + "'";
    if (p.kind == 'n') all += " " + numbers(a.integers);
    all += "\n";
  }
  return all;
}

Planned current;
std::vector<Planned> current_calls;

[[noreturn]] void finding(const Planned& call, const std::string& what) {
  print_current();
  std::fprintf(stderr, "%s: %s\n", call.op.c_str(), what.c_str());
  std::abort();
}

struct Outcome {
  std::string error;                        // empty where there was none
  std::vector<std::vector<char>> tensors;   // the bytes of each result
  std::vector<std::vector<int64_t>> sizes;  // and its shape
  int64_t number = 0;
};

const Registered& operator_of(const std::string& name) {
  Registered& op = operators()[name];
  if (op.schema.empty() && name.substr(0, 5) == "_cpu_") op.schema = operators()[name.substr(5)].schema;
  if (!op.run || op.schema.empty()) {
    std::fprintf(stderr, "there is no operator %s\n", name.c_str());
    std::exit(2);
  }
  return op;
}

Outcome run(const Planned& call) {
  current = call;
  const Registered& op = operator_of(call.op);
  const auto parameters = parameters_of(op.schema);
  std::vector<uint64_t> stack(std::max<size_t>(parameters.size(), 4));
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto argument = call.arguments.find(parameters[i].name);
    stack[i] =
        word_of(parameters[i].name, argument == call.arguments.end() ? Argument{} : argument->second, parameters[i].kind);
  }
  // What the call writes into its own tensors is a result too.
  std::vector<Tensor*> written;
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].kind == 't' && op.schema.find("Tensor(") != std::string::npos) {
      written.push_back(new Tensor(*(Tensor*)stack[i]));
      count_handle(1);
    }
  Outcome out;
  const auto add = [&](Tensor* t) {
    const auto* const data = (const char*)t->storage->data;
    out.sizes.emplace_back(t->sizes, t->sizes + t->dim);
    out.tensors.emplace_back();
    if (t->numel() && t->numel() <= kMostBytes / 8 && t->is_contiguous())
      out.tensors.back().assign(data, data + t->numel() * size_of(t->code));
    delete_tensor(t);
  };
  const std::string returns = op.schema.substr(op.schema.find(") -> ") + 5);
  try {
    op.run(stack.data(), parameters.size(), 4);
    int64_t results = 0;
    for (size_t at = 0; (at = returns.find("Tensor", at)) != std::string::npos; at += 6) ++results;
    const bool optional = returns == "Tensor?" || call.op.substr(0, 5) == "_cpu_";
    if (returns == "int") out.number = (int64_t)stack[0];
    if (returns == "str") count_handle(-1), delete (std::string*)stack[0];
    for (int64_t i = 0; i < results; ++i) {
      if (!optional) {
        add((Tensor*)stack[(size_t)i]);
      } else if (stack[(size_t)i]) {
        auto* const word = (uint64_t*)stack[(size_t)i];
        add((Tensor*)*word);
        delete word;
      }
    }
  } catch (const std::exception& error) {
    out.error = error.what();
    if (out.error.empty() || out.error == "unknown error") finding(call, "an error without a text");
  }
  for (Tensor* const t : written) add(t);
  return out;
}

// ---- Products ----

std::vector<double> numbers_from(const std::vector<char>& bytes, int32_t code) {
  std::vector<double> all(bytes.size() / (size_t)size_of(code));
  for (size_t i = 0; i < all.size(); ++i) all[i] = load_number(code, bytes.data() + i * (size_t)size_of(code));
  return all;
}

// The numbers of a tensor argument, row by row, as the call had them.
std::vector<double> numbers_of(const Planned& call, const char* name, std::vector<int64_t>& sizes) {
  Filler random = filler_of(name, 0);
  Tensor* const t = tensor_of(call.arguments.at(name).tensors.at(0), random);
  sizes.assign(t->sizes, t->sizes + t->dim);
  std::vector<double> all((size_t)t->numel());
  for (size_t i = 0; i < all.size(); ++i) {
    int64_t place = 0, left = (int64_t)i;
    for (int64_t d = t->dim - 1; d >= 0; left /= t->sizes[d--]) place += left % t->sizes[d] * t->strides[d];
    all[i] = load_number(t->code, (const char*)t->storage->data + place * size_of(t->code));
  }
  delete_tensor(t);
  return all;
}

// y of a product against the dense weight, which `dequantize` gives, in double precision. Loose: the tests in Python hold the
// exact bounds.
void check_product(const Planned& call, const Outcome& y) {
  const bool batched = call.op.find("batched_linear") != std::string::npos;
  const bool grouped = call.op.find("grouped_linear") != std::string::npos;
  if (call.op.find("linear") == std::string::npos || call.op == "linear_many") return;
  if (y.tensors.empty() || y.tensors[0].empty() || y.tensors[0].size() > 20000) return;
  Planned dense{"dequantize", call.arguments};
  dense.arguments["dtype"].integer = float32;
  const Outcome w = run(dense);
  if (!w.error.empty()) {
    if (w.error.find("no memory") == std::string::npos) finding(call, "served what dequantize refuses: " + w.error);
    return;
  }
  // A number far beyond the others costs these their digits.
  for (const char* name : {"scale", "zero_point", "meta"})
    for (const TensorValue& t : call.arguments.at(name).tensors)
      if (!t.numbers.empty()) return;
  const int64_t N = w.sizes[0][w.sizes[0].size() - 2], K = w.sizes[0].back(), E = w.sizes[0].size() > 2 ? w.sizes[0][0] : 1;
  std::vector<int64_t> sizes, ignored;
  const auto x = numbers_of(call, "x", sizes);
  const auto weights = numbers_from(w.tensors[0], float32);
  const int32_t type = call.arguments.at("x").tensors[0].code;
  const auto products = numbers_from(y.tensors[0], type);
  const auto optional = [&](const char* name) {
    const auto argument = call.arguments.find(name);
    const bool none = argument == call.arguments.end() || argument->second.none || argument->second.tensors.empty();
    return none || (name[0] == 'b' && (batched || grouped)) ? std::vector<double>() : numbers_of(call, name, ignored);
  };
  const auto bias = optional("bias"), pre_scale = optional("act_pre_scale");
  const auto ends = grouped ? numbers_of(call, "offsets", ignored) : std::vector<double>();
  const int64_t rows = (int64_t)products.size() / N;
  if (rows * N * K > 200000) return;
  const std::string activation = call.arguments.at("activation").text;
  const double precision = activation == "int8" ? 0.05 : type == float32 ? 1e-3 : 0.02;
  // A table's entries have the digits of its largest, about 1, which these codes need not have.
  double largest = 0;
  if (call.arguments.at("format").text != "int") {
    const auto scales = numbers_of(call, "scale", ignored);
    for (const double one : scales) largest = std::max(largest, std::fabs(one));
    if (!call.arguments.at("meta").none) largest *= 0.01;  // integers; the scales of scales are below that (plan.cpp)
  }
  for (int64_t m = 0; m < rows; ++m) {
    int64_t e = batched ? m / (rows / E) : 0;
    while (grouped && e < E && (double)m >= ends[(size_t)e]) ++e;
    double most = 0;
    std::vector<double> in((size_t)K);
    for (int64_t k = 0; k < K; ++k) {
      in[(size_t)k] = x[(size_t)(m * K + k)] * (pre_scale.empty() ? 1 : pre_scale[(size_t)k]);
      most = std::max(most, std::fabs(in[(size_t)k]));
    }
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias.empty() ? 0 : bias[(size_t)n], size = std::fabs(sum);
      for (int64_t k = 0; k < K && e < E; ++k) {
        const double one = weights[(size_t)((e * N + n) * K + k)];
        sum += one * in[(size_t)k], size += (std::fabs(one) + largest) * most;
      }
      const double is = products[(size_t)(m * N + n)], bound = precision * (size + 1e-3);
      if (!(size < 6e4) || std::fabs(is - sum) <= bound) continue;
      finding(call, "y[" + std::to_string(m) + "][" + std::to_string(n) + "] is " + std::to_string(is) + ", not " +
                        std::to_string(sum));
    }
  }
}

// Whether a call would read the same row 2^20 times and more, as torch's sum of such a tensor does: no hang of ours.
bool reads_for_ever(const Planned& call) {
  if (call.op != "_column_spread") return false;
  for (const TensorValue& t : call.arguments.at("weight").tensors)
    if (std::any_of(t.sizes.begin(), t.sizes.end(), [](int64_t size) { return size > kShared; })) return true;
  return false;
}

// A format with a table, for the calls that are planned.
Planned known_table() {
  Planned call{"_set_table", {}};
  call.arguments["format"].text = "known", call.arguments["nbits"].integer = 4;
  call.arguments["values"].tensors.push_back({float32, {16}, {}, -1, 1, {}});
  return call;
}

}  // namespace

void run_input(const uint8_t* data, size_t size) {
  static const bool defined = hqqtensor_define_operators() == 0;
  if (!defined) std::abort();
  static const Outcome table = run(known_table());
  if (!table.error.empty()) std::abort();
  std::vector<Outcome> before;
  const int64_t handles_before = live();
  for (const bool touches_end : {true, false}) {
    Choices choices(data, size);
    const auto sets = hqqtensor::instruction_sets();
    hqqtensor::use_instruction_set(sets[(size_t)choices.below((int64_t)sets.size())]);
    hqqtensor::set_threading(hqqtensor::Threading::whole, 1);
    hqqtensor::fill_scratch(touches_end);
    const int refused = choices.chance(10) ? (int)choices.from_to(1, 8) : 0;
    const auto calls = plan(choices);
    current_calls = calls;
    std::map<std::string, int64_t> ids;
    std::vector<std::pair<std::string, int64_t>> created;
    std::vector<Outcome> now;
    for (size_t i = 0; i < calls.size(); ++i) {
      Planned call = calls[i];
      if (reads_for_ever(call)) {
        now.emplace_back();
        continue;
      }
      for (const char* kind : {"decoder", "pool", "arena"}) {
        const auto argument = call.arguments.find(kind);
        if (argument != call.arguments.end() && argument->second.integer == -1) argument->second.integer = ids[kind];
      }
      set_memory(touches_end, calls.size() == 1 ? refused : 0);
      now.push_back(run(call));
      if (call.op.size() > 4 && call.op.substr(call.op.size() - 4) == "_new")
        created.emplace_back(call.op.substr(1, call.op.size() - 5),
                             ids[call.op.substr(1, call.op.size() - 5)] = now.back().number);
      now.back().number = 0;
      statistics().calls += touches_end;
      statistics().served += touches_end && now.back().error.empty();
      if (touches_end && now.back().error.empty()) ++statistics().served_by_operator[call.op];
      if (touches_end) {
        set_memory(touches_end, 0);
        if (now.back().error.empty()) check_product(call, now.back());
        continue;
      }
      const Outcome &first = before[i], &second = now[i];
      if (call.op == "_set_table") continue;  // the second time there is one of that name
      const bool by_id = first.error.substr(0, 11) == second.error.substr(0, 11) && first.error.substr(0, 11) == "there is no";
      if (first.error != second.error && !by_id)
        finding(call, "two runs differ: '" + first.error + "' and '" + second.error + "'");
      if (first.sizes != second.sizes) finding(call, "two runs give different shapes");
      if (first.tensors != second.tensors && call.op != "_empty_packed" && call.op != "_pool_empty" && call.op != "_arena_take")
        finding(call, "two runs give different numbers");
    }
    for (const auto& [kind, id] : created) {
      Planned end{"_" + kind + "_delete", {}};
      end.arguments[kind].integer = id;
      set_memory(touches_end, 0);
      run(end);
    }
    if (touches_end) {
      ++statistics().inputs;
      statistics().taken += std::all_of(now.begin(), now.end(), [](const Outcome& o) { return o.error.empty(); });
    }
    before = std::move(now);
    if (live() != handles_before) {
      finding(calls[0], std::to_string(live() - handles_before) + " handles were not freed by these calls");
    }
  }
}

void print_current() {
  for (const Planned& call : current_calls) std::fprintf(stderr, "%s:\n%s", call.op.c_str(), described(call).c_str());
  std::fprintf(stderr, "in %s\n", current.op.c_str());
}

Statistics& statistics() {
  static Statistics all;
  return all;
}

}  // namespace fake
