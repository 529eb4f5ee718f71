// The operators of hqqtensor for CPU tensors: arguments checked, kernels called.
// What the kernels do not serve (float64, a backend chosen by hand) goes to the plain operators.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include <atomic>

#include "dispatch/linear.h"
#include "dispatch/pages.h"
#include "dispatch/scratch.h"
#include "dispatch/threads.h"
#include "torch/pool.h"
#include "torch/quantize.h"
#include "torch/weights.h"

namespace {

using at::Tensor;
using at::TensorList;
using std::optional;
namespace hq = hqqtensor;
using hq::Settings;

// 0: automatic, 1: these kernels, 2: the plain operators. The thread's own choice (-1: none) comes first.
std::atomic<int> process_choice{0};
thread_local int thread_choice = -1;

int choice() { return thread_choice >= 0 ? thread_choice : process_choice.load(std::memory_order_relaxed); }

bool serves(const Settings& s, at::ScalarType dtype) {
  if (choice() == 2) return false;
  const bool known = s.format == "int" || s.format == "codebook" || hq::has_table(s.format, s.nbits);
  const bool ok = known && hq::dtype_of(dtype).has_value();
  TORCH_CHECK(ok || choice() != 1, "backend 'cpu' has no kernel for format '", std::string(s.format), "' and ", dtype);
  return ok;
}

template <class Signature>
auto plain(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

int digits_of(const Tensor& x, c10::string_view activation) {
  if (activation == "int8") return 1;
  TORCH_CHECK(activation == "float", "activation must be 'float' or 'int8', got '", std::string(activation), "'");
  if (x.scalar_type() != at::kFloat) return 2;
  // torch.set_float32_matmul_precision("high") asks for at least bfloat16's 16 bits in two parts: 16-bit integers.
  return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST ? 3 : 2;
}

optional<Tensor> as_float(const optional<Tensor>& t, int64_t size, const char* name) {
  if (!t) return t;
  TORCH_CHECK(t->dim() == 1 && t->size(0) == size, name, " must be [", size, "], got ", t->sizes());
  return t->to(at::kFloat).contiguous();
}

const float* data_or_null(const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Rows of activations, one after the other where they lie so: views as matrices would cost more than a small product's
// preparation.
struct Rows {
  Tensor kept;
  const void* data;
  int64_t count, stride;

  Rows(const Tensor& x, int64_t K) {
    if (x.is_contiguous()) {
      data = x.const_data_ptr(), count = x.numel() / K, stride = K;
      return;
    }
    kept = x.reshape({-1, K});
    if (kept.stride(1) != 1 && K != 1) kept = kept.contiguous();
    data = kept.const_data_ptr(), count = kept.size(0), stride = kept.stride(0);
  }
};

// x times one weight into y, a matrix of x's dtype; false where only the plain operator can.
bool product(const Tensor& x, const hq::Weight& w, const optional<Tensor>& bias32, const optional<Tensor>& pre32, int digits,
             void* y, int64_t y_stride) {
  const Rows rows(x, w.K);
  return hq::run_linear({w, rows.data, rows.stride, rows.count, *hq::dtype_of(x.scalar_type()), data_or_null(bias32),
                         data_or_null(pre32), y, y_stride},
                        digits);
}

void check_input(const char* name, const Tensor& x, int64_t K) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == K, name, ": input of shape ", x.sizes(), " does not fit ", K, " in_features");
}

Tensor empty_output(const Tensor& x, int64_t N) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return at::empty(sizes, x.options());
}

Tensor linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
              const optional<Tensor>& bias, const optional<Tensor>& act_pre_scale, TensorList meta, int64_t nbits,
              c10::string_view format, int64_t group_size, int64_t axis, int64_t K, c10::string_view activation) {
  const Settings s{meta, nbits, format, group_size, axis, K};
  static const auto fallback = plain<decltype(linear)>("hqqtensor::registry_linear");
  const auto otherwise = [&] {
    return fallback.call(x, qdata, scale, zero, bias, act_pre_scale, meta, nbits, format, group_size, axis, K, activation);
  };
  if (!serves(s, x.scalar_type())) return otherwise();
  check_input("linear", x, K);
  const int digits = digits_of(x, activation);
  const hq::Packed p = hq::packed(qdata, scale, zero, s, digits);
  const Tensor y = empty_output(x, p.w.N);
  const auto bias32 = as_float(bias, p.w.N, "bias"), pre32 = as_float(act_pre_scale, K, "act_pre_scale");
  return product(x, p.w, bias32, pre32, digits, y.mutable_data_ptr(), p.w.N) ? y : otherwise();
}

Tensor linear_many(const Tensor& x, TensorList qdata, TensorList scale, TensorList zero, TensorList bias, int64_t nbits,
                   c10::string_view format, int64_t group_size, int64_t axis, int64_t K, c10::string_view activation) {
  const Settings s{{}, nbits, format, group_size, axis, K};
  const size_t count = qdata.size();
  TORCH_CHECK(count && scale.size() == count && (zero.empty() || zero.size() == count) && (bias.empty() || bias.size() == count),
              "linear_many: ", count, " weights have ", scale.size(), " scales, ", zero.size(), " zero points and ",
              bias.size(), " biases");
  const auto one = [](TensorList all, size_t i) { return all.empty() ? optional<Tensor>() : optional<Tensor>(all[i]); };
  const auto otherwise = [&] {
    std::vector<Tensor> each;
    for (size_t i = 0; i < count; ++i)
      each.push_back(linear(x, qdata[i], scale[i], one(zero, i), one(bias, i), std::nullopt, {}, nbits, format, group_size,
                            axis, K, activation));
    return at::cat(each, -1);
  };
  if (!serves(s, x.scalar_type())) return otherwise();
  check_input("linear_many", x, K);
  const int digits = digits_of(x, activation);
  std::vector<hq::Packed> packed;
  std::vector<optional<Tensor>> bias32;
  int64_t N = 0;
  for (size_t i = 0; i < count; ++i) {
    packed.push_back(hq::packed(qdata[i], scale[i], one(zero, i), s, digits));
    bias32.push_back(as_float(one(bias, i), packed[i].w.N, "bias"));
    N += packed[i].w.N;
  }
  const Tensor y = empty_output(x, N);
  const Rows rows(x, K);
  std::vector<hq::Problem> parts;
  char* out = (char*)y.mutable_data_ptr();
  for (size_t i = 0; i < count; out += packed[i++].w.N * y.element_size())
    parts.push_back({packed[i].w, rows.data, rows.stride, rows.count, *hq::dtype_of(x.scalar_type()), data_or_null(bias32[i]),
                     nullptr, out, N});
  return hq::run_linears(parts.data(), (int64_t)count, digits) ? y : otherwise();
}

Tensor select(const Tensor& t, int64_t expert) { return t.select(0, expert); }

// One weight out of a stack of experts; settings keep the tensors of its own meta.
struct Expert {
  std::vector<Tensor> meta;
  hq::Packed packed;

  Expert(int64_t e, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero, const Settings& all, int digits) {
    for (const Tensor& t : all.meta) meta.push_back(select(t, e));
    Settings own = all;
    own.meta = meta;
    // A codebook without a leading dimension of experts is one for all of them.
    const auto z = zero && zero->dim() == scale.dim() ? optional<Tensor>(select(*zero, e)) : zero;
    packed = hq::packed(select(qdata, e), select(scale, e), z, own, digits);
  }
};

void check_experts(const char* name, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                   const Settings& s) {
  TORCH_CHECK(qdata.dim() == 3 && scale.dim() == 3 && scale.size(0) == qdata.size(0), name, ": qdata ", qdata.sizes(),
              " and scale ", scale.sizes(), " must be 3-D with one first dimension");
  // Columns of one may have 8 bits and those of the other 4: hq::packed looks at them.
  TORCH_CHECK(!zero || s.format == "codebook" || (zero->dim() == 3 && zero->sizes().slice(0, 2) == scale.sizes().slice(0, 2)),
              name, ": zero_point ", zero->sizes(), " does not fit scale ", scale.sizes());
  for (const Tensor& t : s.meta)
    TORCH_CHECK(t.dim() == 3 && t.size(0) == qdata.size(0), name, ": meta ", t.sizes(), " does not fit ", qdata.size(0), " weights");
}

Tensor grouped_linear(const Tensor& x, const Tensor& offsets, const Tensor& qdata, const Tensor& scale,
                      const optional<Tensor>& zero, const optional<Tensor>& act_pre_scale, TensorList meta, int64_t nbits,
                      c10::string_view format, int64_t group_size, int64_t axis, int64_t K, c10::string_view activation) {
  const Settings s{meta, nbits, format, group_size, axis, K};
  static const auto fallback = plain<decltype(grouped_linear)>("hqqtensor::registry_grouped_linear");
  const auto otherwise = [&] {
    return fallback.call(x, offsets, qdata, scale, zero, act_pre_scale, meta, nbits, format, group_size, axis, K, activation);
  };
  if (!serves(s, x.scalar_type())) return otherwise();
  check_experts("grouped_linear", qdata, scale, zero, s);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == K, "grouped_linear: input ", x.sizes(), " does not fit ", K, " in_features");
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == qdata.size(0) && at::isIntegralType(offsets.scalar_type(), false),
              "grouped_linear: offsets must be integers [", qdata.size(0), "], got ", offsets.scalar_type(), " ", offsets.sizes());
  const Tensor ends = offsets.to(at::kLong).contiguous();
  const auto pre32 = as_float(act_pre_scale, K, "act_pre_scale");
  const int digits = digits_of(x, activation);
  const Tensor y = at::empty({x.size(0), qdata.size(1)}, x.options());
  int64_t first = 0;
  for (int64_t e = 0; e < qdata.size(0); ++e) {
    const int64_t last = ends.const_data_ptr<int64_t>()[e];
    TORCH_CHECK(last >= first && last <= x.size(0), "grouped_linear: offsets must rise from 0 to at most ", x.size(0), ", got ", last);
    if (last == first) continue;
    const Expert own(e, qdata, scale, zero, s, digits);
    if (!product(x.slice(0, first, last), own.packed.w, std::nullopt, pre32, digits,
                 (char*)y.mutable_data_ptr() + first * y.size(1) * y.element_size(), y.size(1)))
      return otherwise();
    first = last;
  }
  if (first < x.size(0)) y.slice(0, first).zero_();
  return y;
}

Tensor batched_linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                      const optional<Tensor>& act_pre_scale, TensorList meta, int64_t nbits, c10::string_view format,
                      int64_t group_size, int64_t axis, int64_t K, c10::string_view activation) {
  TORCH_CHECK(x.dim() == 3 && qdata.dim() == 3 && x.size(0) == qdata.size(0) && x.size(2) == K,
              "batched_linear: input ", x.sizes(), " does not fit packed weights ", qdata.sizes());
  const Tensor offsets = at::arange(1, x.size(0) + 1, at::kLong) * x.size(1);
  return grouped_linear(x.reshape({-1, K}), offsets, qdata, scale, zero, act_pre_scale, meta, nbits, format, group_size,
                        axis, K, activation)
      .view({x.size(0), x.size(1), qdata.size(1)});
}

// Rows of the dense weight: `row(i)` of them into row i of out.
template <class Row>
void dense_rows(const hq::Weight& w, int64_t count, hq::DType dtype, void* out, const Row& row) {
  const hq::Kernels& k = hq::kernels();
  hq::parallel_over(count, 1, count * w.K, [&](int64_t a, int64_t b) {
    float* line = (float*)hq::scratch(4 * w.K + 64, hq::Scratch::kernel);
    for (int64_t i = a; i < b; ++i) {
      if (dtype == hq::DType::f32) {
        k.dequantize_row(w, row(i), (float*)out + i * w.K);
      } else {
        k.dequantize_row(w, row(i), line);
        k.from_float(line, w.K, dtype, (uint16_t*)out + i * w.K);
      }
    }
  });
}

// Where each matrix of a tensor [..., N, K] begins, in numbers.
std::vector<int64_t> starts(const Tensor& t) {
  std::vector<int64_t> all{0};
  for (int64_t d = 0; d < t.dim() - 2; ++d) {
    std::vector<int64_t> next;
    for (const int64_t start : all)
      for (int64_t i = 0; i < t.size(d); ++i) next.push_back(start + i * t.stride(d));
    all = std::move(next);
  }
  return all;
}

// Dense weights of a stack, or of one, into out [..., N, K] whose last dimension has stride 1. All rows of all of them are
// shared out together: the blocks of a cache are many and small.
void dense_into(const Tensor& out, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero, Settings s) {
  TORCH_CHECK(qdata.dim() >= 2 && scale.dim() == qdata.dim(), "dequantize: qdata ", qdata.sizes(), " and scale ",
              scale.sizes(), " must have one rank of 2 or more");
  auto sizes = qdata.sizes().vec();
  sizes.back() = s.in_features;
  TORCH_CHECK(out.sizes() == sizes && (out.stride(-1) == 1 || sizes.back() == 1), "dequantize: out must be ", at::IntArrayRef(sizes),
              " with numbers of a row beside each other, got ", out.sizes(), ", strides ", out.strides());
  const auto stacked = [](const Tensor& t) {
    Tensor all = t.reshape({-1, t.size(-2), t.size(-1)});
    if (all.scalar_type() != at::kByte && !hq::dtype_of(all.scalar_type())) all = all.to(at::kFloat);
    return all.stride(2) == 1 || all.size(2) == 1 ? all : all.contiguous();
  };
  const Tensor q = stacked(qdata), sc = stacked(scale);
  std::vector<Tensor> own;
  for (const Tensor& t : s.meta) own.push_back(stacked(t));
  s.meta = own;
  const auto z = zero && zero->dim() == scale.dim() ? optional<Tensor>(stacked(*zero)) : zero;
  check_experts("dequantize", q, sc, z, s);
  const int64_t E = q.size(0), N = q.size(1), K = s.in_features;
  if (E * N == 0) return;
  // Weights without codebooks and scales of their scales differ in nothing but where their numbers begin.
  const bool alike = own.empty() && s.format != "codebook";
  std::vector<Expert> experts;
  for (int64_t e = 0; e < (alike ? 1 : E); ++e) experts.emplace_back(e, q, sc, z, s, 0);
  const auto places = starts(out);
  const hq::DType dtype = *hq::dtype_of(out.scalar_type());
  char* const data = (char*)out.mutable_data_ptr();
  const int64_t stride = out.stride(-2);
  hq::parallel_over(E * N, 1, E * N * K, [&](int64_t a, int64_t b) {
    const hq::Kernels& k = hq::kernels();
    float* line = (float*)hq::scratch(4 * K + 64, hq::Scratch::kernel);
    for (int64_t i = a; i < b;) {
      const int64_t e = i / N, first = i % N, last = std::min(N, first + b - i);
      hq::Weight w = experts[(size_t)(alike ? 0 : e)].packed.w;
      if (alike) {
        w.qdata += e * q.stride(0);
        w.scale.data = (const char*)w.scale.data + e * sc.stride(0) * sc.element_size();
        if (z) w.zero.data = (const char*)w.zero.data + e * z->stride(0) * z->element_size();
      }
      char* to = data + (places[(size_t)e] + first * stride) * hq::size_of(dtype);
      k.dequantize_rows(w, first, last, dtype, to, stride, line);
      i += last - first;
    }
  });
}

Tensor dequantize(const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero, TensorList meta, int64_t nbits,
                  c10::string_view format, int64_t group_size, int64_t axis, int64_t K, at::ScalarType dtype) {
  const Settings s{meta, nbits, format, group_size, axis, K};
  static const auto fallback = plain<decltype(dequantize)>("hqqtensor::registry_dequantize");
  if (!serves(s, dtype)) return fallback.call(qdata, scale, zero, meta, nbits, format, group_size, axis, K, dtype);
  auto sizes = qdata.sizes().vec();
  TORCH_CHECK(!sizes.empty(), "dequantize: qdata must have rank 2 or more");
  sizes.back() = K;
  const Tensor out = at::empty(sizes, qdata.options().dtype(dtype));
  dense_into(out, qdata, scale, zero, s);
  return out;
}

void dequantize_into(const Tensor& out, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                     TensorList meta, int64_t nbits, c10::string_view format, int64_t group_size, int64_t axis, int64_t K) {
  const Settings s{meta, nbits, format, group_size, axis, K};
  static const auto fallback = plain<decltype(dequantize_into)>("hqqtensor::registry_dequantize_into");
  if (!serves(s, out.scalar_type()))
    return fallback.call(out, qdata, scale, zero, meta, nbits, format, group_size, axis, K);
  dense_into(out, qdata, scale, zero, s);
}

Tensor embedding(const Tensor& indices, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                 TensorList meta, int64_t nbits, c10::string_view format, int64_t group_size, int64_t axis, int64_t K,
                 at::ScalarType dtype) {
  const Settings s{meta, nbits, format, group_size, axis, K};
  static const auto fallback = plain<decltype(embedding)>("hqqtensor::registry_embedding");
  if (!serves(s, dtype)) return fallback.call(indices, qdata, scale, zero, meta, nbits, format, group_size, axis, K, dtype);
  const hq::Packed p = hq::packed(qdata, scale, zero, s, 0);
  TORCH_CHECK(at::isIntegralType(indices.scalar_type(), false), "embedding: indices must be integers, got ",
              indices.scalar_type());
  const Tensor index = indices.to(at::kLong).contiguous();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(rows[i] >= 0 && rows[i] < p.w.N, "embedding: index ", rows[i], " is not in 0 to ", p.w.N - 1);
  auto sizes = indices.sizes().vec();
  sizes.push_back(K);
  const Tensor out = at::empty(sizes, qdata.options().dtype(dtype));
  dense_rows(p.w, index.numel(), *hq::dtype_of(dtype), out.mutable_data_ptr(), [&](int64_t i) { return rows[i]; });
  return out;
}

// Room for packed codes, uint8.
Tensor empty_packed(at::IntArrayRef sizes) {
  const auto options = at::TensorOptions().dtype(at::kByte);
  const size_t bytes = (size_t)c10::multiply_integers(sizes);
  if (bytes < hq::kHugePage) return at::empty(sizes, options);
  return at::from_blob(hq::allocate(bytes), sizes, [bytes](void* data) { hq::release(data, bytes); }, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(hqqtensor, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_many", linear_many);
  m.impl("batched_linear", batched_linear);
  m.impl("grouped_linear", grouped_linear);
  m.impl("dequantize", dequantize);
  m.impl("dequantize_into", dequantize_into);
  m.impl("embedding", embedding);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("instruction_set", [] { return hq::kernels().name; });
  const auto free = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("solve", &hq::solve, free);
  m.def("assign", &hq::assign, free);
  m.def("solve_levels", &hq::solve_levels, free);
  m.def("assign_levels", &hq::assign_levels, free);
  m.def("lloyd", &hq::lloyd, free);
  m.def("set_table", &hq::set_table);
  m.def("empty_packed", [](const std::vector<int64_t>& sizes) { return empty_packed(sizes); });
  pybind11::class_<hq::Pool, std::shared_ptr<hq::Pool>>(m, "Pool")
      .def(pybind11::init<>())
      .def("empty", [](hq::Pool& pool, const std::vector<int64_t>& sizes, const Tensor& like) { return pool.empty(sizes, like); })
      // A copy of what owns a pool has one of its own, with nothing in it yet.
      .def(pybind11::pickle([](const hq::Pool&) { return pybind11::tuple(); },
                            [](const pybind11::tuple&) { return std::make_shared<hq::Pool>(); }));
  m.def("set_process_choice", [](int c) { process_choice = c; });
  m.def("set_thread_choice", [](int c) { thread_choice = c; });
}
