// Products with packed weights.
#include "dispatch/linear.h"

#include <algorithm>
#include <cstring>

#include "torch/operators.h"

namespace hqqtensor {
namespace {

struct Activation {
  DType type;    // of the input
  int digits;    // that it is quantized to, see run_linear
  bool rounded;  // Problem::rounded
};

// How an operator multiplies: nothing where the kernels do not serve the format or the input's dtype.
std::optional<Activation> activation_of(const Tensor& x, std::string_view activation, const PackedArguments& w) {
  const auto type = dtype_of(x.scalar());
  if (!type || !knows_format(w.format, w.nbits)) return std::nullopt;
  HQQ_CHECK(activation == "float" || activation == "exact" || activation == "high" || activation == "int8",
            "activation must be 'float', 'exact', 'high' or 'int8', got '", activation, "'");
  // 16-bit numbers need no more than two digits; "high" allows as much for float32.
  const int digits = activation == "int8" ? 1 : *type != DType::f32 || activation == "high" ? 2 : 3;
  return Activation{*type, digits, *type == DType::bf16 && activation == "float"};
}

void check_input(const char* op, const Tensor& x, int64_t rank, int64_t K) {
  const bool fits = (rank ? x.dim() == rank : x.dim() >= 1) && x.size(-1) == K;
  HQQ_CHECK(fits, op, ": input must be floating-point [", rank == 3 ? "E, M, " : rank == 2 ? "S, " : "..., ", K, "], got ", x);
}

// Activations [..., K] as rows of one distance, copied where they are not.
struct Rows {
  Tensor copy;
  const char* data;
  int64_t count, stride;  // stride in numbers

  Rows(const Tensor& x, int64_t K) : count(x.numel() / K), stride(K) {
    bool in_place = x.stride(-1) == 1 || K == 1;
    int64_t next = -1;  // what the stride of the dimension before must be
    for (int64_t d = x.dim() - 2; in_place && d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (next < 0) stride = x.stride(d);
      in_place = next < 0 || x.stride(d) == next;
      next = x.stride(d) * x.size(d);
    }
    if (!in_place) copy = converted(x, x.scalar()), stride = K;
    data = (const char*)(in_place ? x : copy).data();
  }
};

Tensor output_like(const Tensor& x, int64_t N) {
  int64_t sizes[kMostDimensions];
  HQQ_CHECK(x.dim() <= kMostDimensions, "input has more than ", kMostDimensions, " dimensions");
  std::copy(x.sizes().begin(), x.sizes().end(), sizes);
  sizes[x.dim() - 1] = N;
  return empty({sizes, x.dim()}, x.scalar());
}

Tensor item(const std::vector<Tensor>& all, size_t i) { return all.empty() ? Tensor() : all[i].borrow(); }

// The weights of linear_many; their `meta` follow one another in one list.
std::vector<PackedArguments> split(Call& c, std::vector<Tensor>& bias, std::vector<Tensor>& pre_scale,
                                   std::string_view* activation) {
  const auto qdata = c.tensors(), scale = c.tensors(), zero = c.optional_tensors();
  bias = c.optional_tensors();
  const int64_t nbits = c.integer();
  const std::string_view format = c.text();
  const int64_t group_size = c.integer(), axis = c.integer(), K = c.integer();
  *activation = c.text();
  const auto meta = c.optional_tensors();
  pre_scale = c.optional_tensors();
  const size_t count = qdata.size();
  const auto all_or_none = [count](const std::vector<Tensor>& t) { return t.empty() || t.size() == count; };
  HQQ_CHECK(count && scale.size() == count && all_or_none(zero) && all_or_none(bias) && all_or_none(pre_scale),
            "linear_many: ", (int64_t)count, " weights have ", (int64_t)scale.size(), " scales, ", (int64_t)zero.size(),
            " zero points, ", (int64_t)bias.size(), " biases and ", (int64_t)pre_scale.size(), " act_pre_scales");
  std::vector<PackedArguments> all;
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    PackedArguments a{qdata[i].borrow(), scale[i].borrow(), item(zero, i), {}, nbits, format, group_size, axis, K};
    size_t own = a.scale.scalar() == Scalar::uint8 ? 2 : 0;
    own += a.zero && a.zero.scalar() == Scalar::uint8 ? 2 : 0;
    if (i + 1 == count) own = std::max(own, meta.size() - used);  // so that what is left over is an error
    for (const size_t end = std::min(used + own, meta.size()); used < end; ++used) a.meta.push_back(meta[used].borrow());
    all.push_back(std::move(a));
  }
  return all;
}

// Runs of rows of x [S, K], the e-th up to row ends[e], each times the e-th weight, into y [S, N]; rows after the last run are
// zero. False where no kernel serves.
bool multiply_runs(const Rows& x, const Activation& how, const std::vector<int64_t>& ends, const PackedWeights& weights,
                   const FloatVector& pre_scale, const Tensor& y) {
  const int64_t size = size_of(how.type), N = weights.N();
  auto* out = (char*)y.mutable_data();
  int64_t first = 0;
  for (size_t e = 0; e < ends.size(); ++e) {
    const int64_t last = ends[e];
    if (last == first) continue;
    const Problem run{weights.at((int64_t)e), x.data + first * x.stride * size, x.stride, last - first, how.type, nullptr,
                      pre_scale.data,         out + first * N * size,           N,        how.rounded};
    if (!run_linear(run, how.digits)) return false;
    first = last;
  }
  if (first < x.count && N) std::memset(out + first * N * size, 0, (size_t)((x.count - first) * N * size));
  return true;
}

// An operator with a weight [E, N, K] of several experts; `rank` is that of x. ends_of(weights): where the run of rows of each
// expert ends, after checks.
template <class Ends>
bool multiply_experts(Call& c, const char* op, const Tensor& x, int64_t rank, const Ends& ends_of) {
  PackedArguments a;
  read_packed(c, a);
  const Tensor pre_scale = c.optional_tensor();
  read_settings(c, a);
  const auto how = activation_of(x, c.text(), a);
  if (!how) return false;
  const PackedWeights w(a, 3, how->digits);
  check_input(op, x, rank, w.K());
  const std::vector<int64_t> ends = ends_of(w);
  const FloatVector pre32(pre_scale, "act_pre_scale", w.K());
  Tensor y = output_like(x, w.N());
  if (!multiply_runs(Rows(x, w.K()), *how, ends, w, pre32, y)) return false;
  c.give(std::move(y));
  return true;
}

}  // namespace

bool linear(Call& c) {
  PackedArguments a;
  const Tensor x = c.tensor();
  read_packed(c, a);
  const Tensor bias = c.optional_tensor(), pre_scale = c.optional_tensor();
  read_settings(c, a);
  const auto how = activation_of(x, c.text(), a);
  if (!how) return false;
  const PackedWeights w(a, 2, how->digits);
  check_input("linear", x, 0, w.K());
  const FloatVector bias32(bias, "bias", w.N()), pre32(pre_scale, "act_pre_scale", w.K());
  const Rows rows(x, w.K());
  Tensor y = output_like(x, w.N());
  const Problem p{w.at(0),     rows.data,  rows.stride,      rows.count, how->type,
                  bias32.data, pre32.data, y.mutable_data(), w.N(),      how->rounded};
  if (!run_linear(p, how->digits)) return false;
  c.give(std::move(y));
  return true;
}

bool linear_many(Call& c) {
  const Tensor x = c.tensor();
  std::vector<Tensor> bias, pre_scale;
  std::string_view activation;
  const auto all = split(c, bias, pre_scale, &activation);
  const auto how = activation_of(x, activation, all[0]);
  if (!how) return false;
  std::vector<PackedWeights> weights;
  std::vector<FloatVector> bias32, pre32;
  int64_t N = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    weights.emplace_back(all[i], 2, how->digits);
    bias32.emplace_back(item(bias, i), "bias", weights[i].N());
    pre32.emplace_back(item(pre_scale, i), "act_pre_scale", weights[i].K());
    N += weights[i].N();
  }
  check_input("linear_many", x, 0, weights[0].K());
  const Rows rows(x, weights[0].K());
  Tensor y = output_like(x, N);
  std::vector<Problem> parts;
  auto* out = (char*)y.mutable_data();
  for (size_t i = 0; i < all.size(); out += weights[i++].N() * y.item_size())
    parts.push_back(
        {weights[i].at(0), rows.data, rows.stride, rows.count, how->type, bias32[i].data, pre32[i].data, out, N, how->rounded});
  if (!run_linears(parts.data(), (int64_t)parts.size(), how->digits)) return false;
  c.give(std::move(y));
  return true;
}

bool grouped_linear(Call& c) {
  const Tensor x = c.tensor(), offsets = c.tensor();
  return multiply_experts(c, "grouped_linear", x, 2, [&](const PackedWeights& w) {
    HQQ_CHECK(offsets.dim() == 1 && offsets.size(0) == w.count() && is_integer(offsets.scalar()),
              "grouped_linear: offsets must be integers [", w.count(), "], got ", offsets);
    const auto ends = integers_of(offsets);
    int64_t first = 0;
    for (const int64_t last : ends) {
      HQQ_CHECK(last >= first && last <= x.size(0), "grouped_linear: offsets must rise from 0 to at most ", x.size(0), ", got ",
                last, " after ", first);
      first = last;
    }
    return ends;
  });
}

bool batched_linear(Call& c) {
  const Tensor x = c.tensor();
  return multiply_experts(c, "batched_linear", x, 3, [&](const PackedWeights& w) {
    HQQ_CHECK(x.size(0) == w.count(), "batched_linear: input ", x, " does not fit ", w.count(), " weights");
    std::vector<int64_t> ends;
    if (x.numel() == 0 || w.N() == 0) return ends;  // of no numbers there may be any count of weights, without memory
    for (int64_t e = 1; e <= w.count(); ++e) ends.push_back(e * x.size(1));
    return ends;
  });
}

}  // namespace hqqtensor
