// Attention of a few new tokens over a cache: its schema, and what it computes, are in hqqtensor/ops/attention.py.
#include "dispatch/attention.h"

#include "torch/operators.h"
#include "torch/packed_states.h"

namespace hqqtensor {

bool attention(Call& c) {
  const Tensor q = c.tensor(), keys = c.tensor(), values = c.tensor();
  const Tensor mask = c.optional_tensor(), sinks = c.optional_tensor();
  AttentionCall a{};
  a.scaling = (float)c.real(), a.softcap = (float)c.real();
  HQQ_CHECK(q.dim() == 4 && is_floating(q.scalar()) && q.numel(),
            "attention: query must be floating-point [batch, heads, tokens, dim], got ", q);
  a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.dim = q.size(3);
  for (const Tensor* t : {&keys, &values})
    HQQ_CHECK(keys.dim() == 4 && values.dim() == 4 && t->scalar() == q.scalar() && t->size(0) == a.batch &&
                  t->size(3) == a.dim && t->numel() && a.heads % t->size(1) == 0 && keys.size(1) == values.size(1) &&
                  keys.size(2) == values.size(2),
              "attention: key and value must be [", a.batch, ", heads, tokens, ", a.dim,
              "] of the query's dtype, with heads that ", a.heads, " share, got ", keys, " and ", values);
  a.kv_heads = keys.size(1), a.length = keys.size(2);
  PackedStates packed(c, a.dim);
  HQQ_CHECK(!packed || packed.count() == 1, "attention: packed states must be those of one cache, got ",
            (int64_t)packed.count());
  if (packed) a.packed = packed.of(0, a.batch, a.kv_heads);
  const int64_t length = a.packed.tokens() + a.length;
  HQQ_CHECK(!mask || (mask.dim() == 4 && mask.scalar() == Scalar::boolean && (mask.size(0) == a.batch || mask.size(0) == 1) &&
                      mask.size(1) == 1 && mask.size(2) == a.tokens && mask.size(3) == length),
            "attention: mask must be bool [", a.batch, " or 1, 1, ", a.tokens, ", ", length, "], got ", mask);
  HQQ_CHECK(!sinks || (sinks.dim() == 1 && is_floating(sinks.scalar()) && sinks.size(0) == a.heads),
            "attention: sinks must be floating-point [", a.heads, "], got ", sinks);
  for (const Tensor* t : {&q, &keys, &values, &mask, &sinks})
    HQQ_CHECK(!*t || t->is_cpu(), "attention: all tensors must be on the CPU, got one on ", t->device());
  const auto type = dtype_of(q.scalar());
  const auto rows = [&](const Tensor& t) { return t.stride(3) == 1 && (t.stride(2) == a.dim || a.length == 1); };
  const bool readable = q.stride(3) == 1 && rows(keys) && rows(values) && (!mask || mask.stride(3) == 1 || length == 1);
  if (!type || a.dim % 16 != 0 || !readable) return false;
  a.type = *type;
  a.q = q.data(), a.keys = keys.data(), a.values = values.data();
  for (int i = 0; i < 3; ++i) a.q_strides[i] = q.stride(i);
  for (int i = 0; i < 2; ++i) a.key_strides[i] = keys.stride(i), a.value_strides[i] = values.stride(i);
  if (mask) {
    a.mask = (const uint8_t*)mask.data();
    a.mask_strides[0] = mask.size(0) == 1 ? 0 : mask.stride(0), a.mask_strides[1] = mask.stride(2);
  }
  const FloatVector sink_scores(sinks.borrow(), "sinks", a.heads);
  a.sinks = sink_scores.data;
  const int64_t sizes[] = {a.batch, a.tokens, a.heads, a.dim};
  Tensor y = empty(Sizes(sizes, 4), q.scalar());
  a.y = y.mutable_data();
  run_attention(a);
  c.give(std::move(y));
  return true;
}

}  // namespace hqqtensor
