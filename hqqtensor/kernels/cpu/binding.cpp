// The operators of hqqtensor for CPU tensors: arguments checked, threads shared out, kernels called.
// What the kernels do not serve (other formats, float64, a backend chosen by hand) goes to the plain operators.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/extension.h>

#include <atomic>

#include "kernels.h"
#include "quantize.h"

namespace {

using at::Tensor;
using std::optional;
namespace hq = hqqtensor;

// 0: automatic, 1: these kernels, 2: the plain operators. The thread's own choice (-1: none) comes first.
std::atomic<int> process_choice{0};
thread_local int thread_choice = -1;

int choice() { return thread_choice >= 0 ? thread_choice : process_choice.load(std::memory_order_relaxed); }

optional<hq::DType> dtype_of(at::ScalarType t) {
  if (t == at::kFloat) return hq::DType::f32;
  if (t == at::kHalf) return hq::DType::f16;
  if (t == at::kBFloat16) return hq::DType::bf16;
  return std::nullopt;
}

bool serves(const optional<Tensor>& zero, c10::string_view format, std::initializer_list<at::ScalarType> dtypes) {
  if (choice() == 2) return false;
  bool ok = format == "int" && zero.has_value();
  for (auto t : dtypes) ok = ok && dtype_of(t).has_value();
  TORCH_CHECK(ok || choice() != 1, "backend 'cpu' has no kernel for format '", std::string(format), "' and these dtypes");
  return ok;
}

// Scratch memory of a thread, kept for the next call: page faults cost more than the work of a small layer.
char* scratch(int64_t bytes, int slot) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[2];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, (size_t)b.size);
    if (b.data == nullptr) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return (char*)b.data;
}

struct Packed {  // a Weight and the tensors that keep its memory
  Tensor qdata, scale, zero;
  hq::Weight w;
};

Packed packed(const Tensor& qdata, const Tensor& scale, const Tensor& zero, int64_t nbits, int64_t group_size,
              int64_t axis, int64_t K) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8, "nbits must be 1 to 8, got ", nbits);
  TORCH_CHECK(axis == 0 || axis == 1, "axis must be 0 or 1, got ", axis);
  TORCH_CHECK(group_size >= 1 && K >= 1, "group_size and in_features must be positive, got ", group_size, ", ", K);
  TORCH_CHECK(qdata.dim() == 2 && qdata.scalar_type() == at::kByte && qdata.size(1) == (K + 7) / 8 * nbits,
              "qdata must be uint8 [N, ", (K + 7) / 8 * nbits, "], got ", qdata.scalar_type(), " ", qdata.sizes());
  const int64_t N = qdata.size(0), groups = ((axis == 1 ? K : N) + group_size - 1) / group_size;
  const at::IntArrayRef shape = scale.sizes();
  TORCH_CHECK(scale.dim() == 2 && scale.sizes() == zero.sizes(), "scale and zero_point must have one shape [rows, "
              "columns], got ", shape, " and ", zero.sizes());
  // A slice of rows keeps the groups of an axis-0 weight: there the number of groups is the scale's own.
  TORCH_CHECK(axis == 1 ? shape[0] == N && shape[1] == groups : shape[0] >= 1 && shape[1] == K,
              "scale has shape ", shape, ", expected ", axis == 1 ? N : groups, " x ", axis == 1 ? groups : K);
  Packed p{qdata.stride(1) == 1 || qdata.size(1) == 1 ? qdata : qdata.contiguous(), scale, zero, {}};
  if (p.scale.scalar_type() != p.zero.scalar_type() || !dtype_of(p.scale.scalar_type())) {
    p.scale = p.scale.to(at::kFloat);
    p.zero = p.zero.to(at::kFloat);
  }
  if (p.scale.stride(1) != 1 || p.scale.strides() != p.zero.strides()) {
    p.scale = p.scale.contiguous();
    p.zero = p.zero.contiguous();
  }
  p.w = {p.qdata.const_data_ptr<uint8_t>(), p.qdata.stride(0), p.scale.const_data_ptr(), p.zero.const_data_ptr(),
         *dtype_of(p.scale.scalar_type()), p.scale.stride(0), N, K, shape[axis == 1 ? 1 : 0], group_size,
         (int)nbits, (int)axis};
  return p;
}

template <class F>
void over(int64_t count, int64_t step, int64_t work, const F& f) {
  // Whole steps a thread; work below what waking another thread costs stays here.
  const int64_t pieces = (count + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, pieces * 65536 / std::max<int64_t>(work, 1));
  at::parallel_for(0, pieces, grain, [&](int64_t a, int64_t b) { f(a * step, std::min(b * step, count)); });
}

constexpr int64_t kSmall = 16;  // rows of x up to which linear_small is the faster one (docs/performance.md)

void run_linear(hq::Problem& p, int digits) {
  const hq::Kernels& k = hq::kernels();
  const hq::Weight& w = p.w;
  if (p.M == 0 || w.N == 0) return;
  const int64_t chunks = (w.K + 63) / 64, work = w.N * w.K * p.M;
  if (w.axis == 0 && p.M <= kSmall) {
    const int64_t bytes = k.linear_small_axis0_scratch(p, digits);
    over(w.groups, 1, work, [&](int64_t a, int64_t b) { k.linear_small_axis0(p, digits, a, b, scratch(bytes, 1)); });
    return;
  }
  const bool plain = p.x_type == hq::DType::f32 && p.pre_scale == nullptr;
  const bool small = (p.M <= kSmall || digits == 1) && w.axis == 1 && hq::lane_groups(w);
  const int64_t floats = p.M * w.K + 16;
  const int64_t entries = hq::step_entries(w);
  const int64_t ints = small ? p.M * (chunks * digits * 64 + 4 * entries + 4 * hq::padded(w.groups)) : 0;
  char* shared = scratch((plain ? 0 : floats * 4) + ints + 128, 0);
  const float* x = (const float*)p.x;
  int64_t x_stride = p.x_stride;
  if (!plain) {
    float* copy = (float*)(shared + (ints + 63) / 64 * 64);
    for (int64_t m = 0; m < p.M; ++m) {
      k.to_float((const char*)p.x + m * p.x_stride * (p.x_type == hq::DType::f32 ? 4 : 2), p.x_type, w.K, copy + m * w.K);
      if (p.pre_scale)
        for (int64_t i = 0; i < w.K; ++i) copy[m * w.K + i] *= p.pre_scale[i];
    }
    x = copy;
    x_stride = w.K;
  }
  if (small) {
    hq::Digits d{(int8_t*)shared, nullptr, nullptr, chunks, entries, digits};
    d.step = (float*)(shared + p.M * chunks * digits * 64);
    d.sum = d.step + p.M * entries;
    bool whole = true;
    for (int64_t m = 0; m < p.M; ++m) whole = whole && k.prepare(x + m * x_stride, w, m, d);
    if (whole) {
      const int64_t bytes = 4 * k.linear_small_scratch(p);
      over(w.N, 4, work, [&](int64_t a, int64_t b) { k.linear_small(p, d, a, b, (float*)scratch(bytes, 1)); });
      return;
    }
  }
  const int64_t bytes = 4 * k.linear_large_scratch(p);
  over(w.N, 12, work, [&](int64_t a, int64_t b) { k.linear_large(p, x, x_stride, a, b, (float*)scratch(bytes, 1)); });
}

int exact_digits(const Tensor& x) { return x.scalar_type() == at::kFloat ? 3 : 2; }

optional<Tensor> as_float(const optional<Tensor>& t, int64_t size, const char* name) {
  if (!t) return t;
  TORCH_CHECK(t->dim() == 1 && t->size(0) == size, name, " must be [", size, "], got ", t->sizes());
  return t->to(at::kFloat).contiguous();
}

Tensor linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
              const optional<Tensor>& bias, const optional<Tensor>& act_pre_scale, int64_t nbits,
              c10::string_view format, int64_t group_size, int64_t axis, int64_t K) {
  if (!serves(zero, format, {x.scalar_type()})) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("hqqtensor::registry_linear", "");
    static auto call = op.typed<decltype(linear)>();
    return call.call(x, qdata, scale, zero, bias, act_pre_scale, nbits, format, group_size, axis, K);
  }
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == K, "linear: input of shape ", x.sizes(), " does not fit ", K, " in_features");
  Packed p = packed(qdata, scale, *zero, nbits, group_size, axis, K);
  const auto bias32 = as_float(bias, p.w.N, "bias"), pre = as_float(act_pre_scale, K, "act_pre_scale");
  auto sizes = x.sizes().vec();
  sizes.back() = p.w.N;
  Tensor y = at::empty(sizes, x.options());
  const Tensor rows = x.reshape({-1, K}), flat = rows.stride(1) == 1 || K == 1 ? rows : rows.contiguous();
  hq::Problem problem{p.w, flat.const_data_ptr(), flat.stride(0), flat.size(0), *dtype_of(x.scalar_type()),
                      bias32 ? bias32->const_data_ptr<float>() : nullptr,
                      pre ? pre->const_data_ptr<float>() : nullptr, y.mutable_data_ptr()};
  run_linear(problem, exact_digits(x));
  return y;
}

Tensor batched_linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                      const optional<Tensor>& act_pre_scale, int64_t nbits, c10::string_view format,
                      int64_t group_size, int64_t axis, int64_t K) {
  if (!serves(zero, format, {x.scalar_type()})) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("hqqtensor::registry_batched_linear", "");
    static auto call = op.typed<decltype(batched_linear)>();
    return call.call(x, qdata, scale, zero, act_pre_scale, nbits, format, group_size, axis, K);
  }
  TORCH_CHECK(x.dim() == 3 && qdata.dim() == 3 && x.size(0) == qdata.size(0) && x.size(2) == K,
              "batched_linear: input ", x.sizes(), " does not fit packed weights ", qdata.sizes());
  TORCH_CHECK(scale.dim() == 3 && scale.size(0) == x.size(0) && zero->sizes() == scale.sizes(),
              "batched_linear: scale ", scale.sizes(), " does not fit ", x.size(0), " weights");
  Tensor y = at::empty({x.size(0), x.size(1), qdata.size(1)}, x.options());
  const Tensor in = x.stride(2) == 1 || K == 1 ? x : x.contiguous();
  const auto pre = as_float(act_pre_scale, K, "act_pre_scale");
  for (int64_t e = 0; e < x.size(0); ++e) {
    Packed p = packed(qdata.select(0, e), scale.select(0, e), zero->select(0, e), nbits, group_size, axis, K);
    const Tensor rows = in.select(0, e);
    hq::Problem problem{p.w, rows.const_data_ptr(), rows.stride(0), rows.size(0), *dtype_of(x.scalar_type()), nullptr,
                        pre ? pre->const_data_ptr<float>() : nullptr, y.select(0, e).mutable_data_ptr()};
    run_linear(problem, exact_digits(x));
  }
  return y;
}

// Rows of the dense weight: `row(i)` of them into row i of out.
template <class Row>
void dense_rows(const hq::Weight& w, int64_t count, hq::DType dtype, void* out, const Row& row) {
  const hq::Kernels& k = hq::kernels();
  over(count, 1, count * w.K, [&](int64_t a, int64_t b) {
    float* line = (float*)scratch(4 * w.K + 64, 1);
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

Tensor dequantize(const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero, int64_t nbits,
                  c10::string_view format, int64_t group_size, int64_t axis, int64_t K, at::ScalarType dtype) {
  if (!serves(zero, format, {dtype})) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("hqqtensor::registry_dequantize", "");
    static auto call = op.typed<decltype(dequantize)>();
    return call.call(qdata, scale, zero, nbits, format, group_size, axis, K, dtype);
  }
  TORCH_CHECK(qdata.dim() >= 2 && scale.dim() == qdata.dim() && zero->dim() == qdata.dim(),
              "dequantize: qdata ", qdata.sizes(), ", scale ", scale.sizes(), " and zero_point ", zero->sizes(),
              " must have one rank of 2 or more");
  auto sizes = qdata.sizes().vec();
  const int64_t N = sizes[sizes.size() - 2];
  sizes.back() = K;
  Tensor out = at::empty(sizes, qdata.options().dtype(dtype));
  const Tensor q = qdata.reshape({-1, N, qdata.size(-1)});
  const Tensor s = scale.reshape({-1, scale.size(-2), scale.size(-1)});
  const Tensor z = zero->reshape({-1, zero->size(-2), zero->size(-1)});
  TORCH_CHECK(s.size(0) == q.size(0) && z.size(0) == q.size(0), "dequantize: leading dimensions differ");
  for (int64_t e = 0; e < q.size(0); ++e) {
    Packed p = packed(q.select(0, e), s.select(0, e), z.select(0, e), nbits, group_size, axis, K);
    char* to = (char*)out.mutable_data_ptr() + e * N * K * (int64_t)out.element_size();
    dense_rows(p.w, N, *dtype_of(dtype), to, [](int64_t i) { return i; });
  }
  return out;
}

Tensor embedding(const Tensor& indices, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                 int64_t nbits, c10::string_view format, int64_t group_size, int64_t axis, int64_t K,
                 at::ScalarType dtype) {
  if (!serves(zero, format, {dtype})) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("hqqtensor::registry_embedding", "");
    static auto call = op.typed<decltype(embedding)>();
    return call.call(indices, qdata, scale, zero, nbits, format, group_size, axis, K, dtype);
  }
  Packed p = packed(qdata, scale, *zero, nbits, group_size, axis, K);
  TORCH_CHECK(at::isIntegralType(indices.scalar_type(), false), "embedding: indices must be integers, got ",
              indices.scalar_type());
  const Tensor index = indices.to(at::kLong).contiguous();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(rows[i] >= 0 && rows[i] < p.w.N, "embedding: index ", rows[i], " is not in 0 to ", p.w.N - 1);
  auto sizes = indices.sizes().vec();
  sizes.push_back(K);
  Tensor out = at::empty(sizes, qdata.options().dtype(dtype));
  dense_rows(p.w, index.numel(), *dtype_of(dtype), out.mutable_data_ptr(), [&](int64_t i) { return rows[i]; });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hqqtensor, CPU, m) {
  m.impl("linear", linear);
  m.impl("batched_linear", batched_linear);
  m.impl("dequantize", dequantize);
  m.impl("embedding", embedding);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("instruction_set", [] { return hq::kernels().name; });
  const auto free = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("solve", &hq::solve, free);
  m.def("assign", &hq::assign, free);
  m.def("set_process_choice", [](int c) { process_choice = c; });
  m.def("set_thread_choice", [](int c) { thread_choice = c; });
}
