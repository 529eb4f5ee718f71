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
using Linear = Tensor(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                      const optional<Tensor>&, int64_t, c10::string_view, int64_t, int64_t, int64_t);
using Batched = Tensor(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                       int64_t, c10::string_view, int64_t, int64_t, int64_t);
using Dequantize = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, int64_t, c10::string_view, int64_t,
                          int64_t, int64_t, at::ScalarType);

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Settings {
  int64_t nbits;
  std::string format;
  int64_t group_size, axis;
  int64_t in_features;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["nbits"] = nbits;
    ctx->saved_data["format"] = format;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["in_features"] = in_features;
  }
  explicit Settings(AutogradContext* ctx)
      : nbits(ctx->saved_data["nbits"].toInt()),
        format(ctx->saved_data["format"].toStringRef()),
        group_size(ctx->saved_data["group_size"].toInt()),
        axis(ctx->saved_data["axis"].toInt()),
        in_features(ctx->saved_data["in_features"].toInt()) {}
  Settings(int64_t n, c10::string_view f, int64_t g, int64_t a, int64_t k)
      : nbits(n), format(f), group_size(g), axis(a), in_features(k) {}
};

// What all gradients need: the packed weight, and the scale of the activations.
void save(AutogradContext* ctx, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
          const optional<Tensor>& act, const Settings& settings) {
  ctx->save_for_backward({qdata, scale, zero.value_or(Tensor()), act.value_or(Tensor())});
  settings.save(ctx);
}

Tensor input_gradient(AutogradContext* ctx, const Tensor& grad) {
  static const auto dequantize = op<Dequantize>("hqqtensor::dequantize");
  const auto saved = ctx->get_saved_variables();
  const Settings s(ctx);
  const optional<Tensor> zero = saved[2].defined() ? optional<Tensor>(saved[2]) : std::nullopt;
  const Tensor w = dequantize.call(saved[0], saved[1], zero, s.nbits, s.format, s.group_size, s.axis, s.in_features,
                                   grad.scalar_type());
  const Tensor out = at::matmul(grad, w);
  return saved[3].defined() ? out * saved[3].to(grad.scalar_type()) : out;
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& qdata, const Tensor& scale,
                        const optional<Tensor>& zero, const optional<Tensor>& bias, const optional<Tensor>& act,
                        int64_t nbits, c10::string_view format, int64_t group_size, int64_t axis, int64_t K) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto linear = op<Linear>("hqqtensor::linear");
    save(ctx, qdata, scale, zero, act, Settings(nbits, format, group_size, axis, K));
    ctx->saved_data["bias"] = bias ? (int64_t)bias->scalar_type() : -1;
    ctx->saved_data["bias_edge"] = zero ? 4 : 3;  // tensors that are absent have no edge
    return linear.call(x, qdata, scale, zero, bias, act, nbits, format, group_size, axis, K);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(11);
    if (ctx->needs_input_grad(0)) out[0] = input_gradient(ctx, grads[0]);
    const int64_t bias = ctx->saved_data["bias"].toInt();
    if (bias >= 0 && ctx->needs_input_grad((size_t)ctx->saved_data["bias_edge"].toInt()))
      out[4] = grads[0].flatten(0, -2).sum(0).to((at::ScalarType)bias);
    return out;
  }
};

struct BatchedFunction : torch::autograd::Function<BatchedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& qdata, const Tensor& scale,
                        const optional<Tensor>& zero, const optional<Tensor>& act, int64_t nbits,
                        c10::string_view format, int64_t group_size, int64_t axis, int64_t K) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto linear = op<Batched>("hqqtensor::batched_linear");
    save(ctx, qdata, scale, zero, act, Settings(nbits, format, group_size, axis, K));
    return linear.call(x, qdata, scale, zero, act, nbits, format, group_size, axis, K);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(10);
    out[0] = input_gradient(ctx, grads[0]);
    return out;
  }
};

bool wanted(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }

Tensor linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
              const optional<Tensor>& bias, const optional<Tensor>& act, int64_t nbits, c10::string_view format,
              int64_t group_size, int64_t axis, int64_t K) {
  if (wanted(x) || (bias && wanted(*bias)))
    return LinearFunction::apply(x, qdata, scale, zero, bias, act, nbits, format, group_size, axis, K);
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto call = op<Linear>("hqqtensor::linear");
  return call.call(x, qdata, scale, zero, bias, act, nbits, format, group_size, axis, K);
}

Tensor batched_linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const optional<Tensor>& zero,
                      const optional<Tensor>& act, int64_t nbits, c10::string_view format, int64_t group_size,
                      int64_t axis, int64_t K) {
  if (wanted(x)) return BatchedFunction::apply(x, qdata, scale, zero, act, nbits, format, group_size, axis, K);
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto call = op<Batched>("hqqtensor::batched_linear");
  return call.call(x, qdata, scale, zero, act, nbits, format, group_size, axis, K);
}

}  // namespace

TORCH_LIBRARY_IMPL(hqqtensor, Autograd, m) {
  m.impl("linear", linear);
  m.impl("batched_linear", batched_linear);
}
