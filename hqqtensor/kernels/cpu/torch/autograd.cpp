// Gradients of the operators: to the activations (and bias), never to codes. The same as hqqtensor/ops/gradients.py, in
// C++ so that no Python runs between torch and the kernel where no gradient is asked for.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using at::TensorList;
using Text = c10::string_view;
using Linear = Tensor(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                      const optional<Tensor>&, TensorList, int64_t, Text, int64_t, int64_t, int64_t, Text);
using Batched = Tensor(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                       TensorList, int64_t, Text, int64_t, int64_t, int64_t, Text);
using Grouped = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                       const optional<Tensor>&, TensorList, int64_t, Text, int64_t, int64_t, int64_t, Text);
using Dequantize = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, TensorList, int64_t, Text, int64_t,
                          int64_t, int64_t, at::ScalarType);

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What all gradients need: the packed weight and its settings.
void save(AutogradContext* ctx, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
          const optional<Tensor>& act, TensorList meta, int64_t nbits, Text format, int64_t group_size, int64_t axis,
          int64_t K, const Tensor& offsets = {}) {
  variable_list kept{qdata, scale, zero.value_or(Tensor()), act.value_or(Tensor()), offsets};
  kept.insert(kept.end(), meta.begin(), meta.end());
  ctx->save_for_backward(kept);
  ctx->saved_data["numbers"] = std::vector<int64_t>{nbits, group_size, axis, K};
  ctx->saved_data["format"] = std::string(format);
}

// The gradient to x [..., K] of y [..., N]; with offsets, that of grouped_linear.
Tensor input_gradient(AutogradContext* ctx, const Tensor& grad) {
  static const auto dequantize = op<Dequantize>("hqqtensor::dequantize");
  const auto saved = ctx->get_saved_variables();
  const auto n = ctx->saved_data["numbers"].toIntVector();
  const optional<Tensor> zero = saved[2].defined() ? optional<Tensor>(saved[2]) : std::nullopt;
  const Tensor w = dequantize.call(saved[0], saved[1], zero, TensorList(saved).slice(5), n[0],
                                   ctx->saved_data["format"].toStringRef(), n[1], n[2], n[3], grad.scalar_type());
  Tensor out;
  if (saved[4].defined()) {
    out = grad.new_zeros({grad.size(0), n[3]});
    const Tensor ends = saved[4].to(at::kLong).cpu();
    int64_t first = 0;
    for (int64_t e = 0; e < ends.size(0); ++e) {
      const int64_t last = ends[e].item<int64_t>();
      if (last > first) out.slice(0, first, last).copy_(at::matmul(grad.slice(0, first, last), w[e]));
      first = last;
    }
  } else {
    out = at::matmul(grad, w);
  }
  return saved[3].defined() ? out * saved[3].to(grad.scalar_type()) : out;
}

constexpr size_t kInputs = 24;  // at least as many as there are inputs, those in meta among them; absent gradients beyond are dropped

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& qdata, const Tensor& scale,
                        const optional<Tensor>& zero, const optional<Tensor>& bias, const optional<Tensor>& act,
                        std::vector<Tensor> meta, int64_t nbits, Text format, int64_t group_size, int64_t axis, int64_t K,
                        Text activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto linear = op<Linear>("hqqtensor::linear");
    save(ctx, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K);
    ctx->saved_data["bias"] = bias ? (int64_t)bias->scalar_type() : -1;
    ctx->saved_data["bias_edge"] = zero ? 4 : 3;  // tensors that are absent have no edge
    return linear.call(x, qdata, scale, zero, bias, act, meta, nbits, format, group_size, axis, K, activation);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(kInputs);
    if (ctx->needs_input_grad(0)) out[0] = input_gradient(ctx, grads[0]);
    const int64_t bias = ctx->saved_data["bias"].toInt();
    if (bias >= 0 && ctx->needs_input_grad((size_t)ctx->saved_data["bias_edge"].toInt()))
      out[4] = grads[0].flatten(0, -2).sum(0).to((at::ScalarType)bias);
    return out;
  }
};

struct BatchedFunction : torch::autograd::Function<BatchedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& qdata, const Tensor& scale,
                        const optional<Tensor>& zero, const optional<Tensor>& act, std::vector<Tensor> meta, int64_t nbits,
                        Text format, int64_t group_size, int64_t axis, int64_t K, Text activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto linear = op<Batched>("hqqtensor::batched_linear");
    save(ctx, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K);
    return linear.call(x, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K, activation);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(kInputs);
    out[0] = input_gradient(ctx, grads[0]);
    return out;
  }
};

struct GroupedFunction : torch::autograd::Function<GroupedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& offsets, const Tensor& qdata,
                        const Tensor& scale, const optional<Tensor>& zero, const optional<Tensor>& act,
                        std::vector<Tensor> meta, int64_t nbits, Text format, int64_t group_size, int64_t axis, int64_t K,
                        Text activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto linear = op<Grouped>("hqqtensor::grouped_linear");
    save(ctx, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K, offsets);
    return linear.call(x, offsets, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K, activation);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(kInputs);
    out[0] = input_gradient(ctx, grads[0]);
    return out;
  }
};

bool wanted(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }

Tensor linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
              const optional<Tensor>& bias, const optional<Tensor>& act, TensorList meta, int64_t nbits, Text format,
              int64_t group_size, int64_t axis, int64_t K, Text activation) {
  if (wanted(x) || (bias && wanted(*bias)))
    return LinearFunction::apply(x, qdata, scale, zero, bias, act, meta.vec(), nbits, format, group_size, axis, K, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto call = op<Linear>("hqqtensor::linear");
  return call.call(x, qdata, scale, zero, bias, act, meta, nbits, format, group_size, axis, K, activation);
}

Tensor batched_linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                      const optional<Tensor>& act, TensorList meta, int64_t nbits, Text format, int64_t group_size,
                      int64_t axis, int64_t K, Text activation) {
  if (wanted(x))
    return BatchedFunction::apply(x, qdata, scale, zero, act, meta.vec(), nbits, format, group_size, axis, K, activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto call = op<Batched>("hqqtensor::batched_linear");
  return call.call(x, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K, activation);
}

Tensor grouped_linear(const Tensor& x, const Tensor& offsets, const Tensor& qdata, const Tensor& scale,
                      const optional<Tensor>& zero, const optional<Tensor>& act, TensorList meta, int64_t nbits, Text format,
                      int64_t group_size, int64_t axis, int64_t K, Text activation) {
  if (wanted(x))
    return GroupedFunction::apply(x, offsets, qdata, scale, zero, act, meta.vec(), nbits, format, group_size, axis, K,
                                  activation);
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto call = op<Grouped>("hqqtensor::grouped_linear");
  return call.call(x, offsets, qdata, scale, zero, act, meta, nbits, format, group_size, axis, K, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(hqqtensor, Autograd, m) {
  m.impl("linear", linear);
  m.impl("batched_linear", batched_linear);
  m.impl("grouped_linear", grouped_linear);
}
