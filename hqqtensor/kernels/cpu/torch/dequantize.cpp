// Dense numbers of packed weights: whole stacks, or rows by index.
#include <algorithm>
#include <numeric>

#include "dispatch/kernels.h"
#include "dispatch/scratch.h"
#include "dispatch/threads.h"
#include "torch/operators.h"

namespace hqqtensor {
namespace {

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

// True if no two numbers of a tensor share memory: each dimension steps over all that those of smaller strides reach.
bool no_overlap(const Tensor& t) {
  if (t.numel() == 0) return true;
  std::vector<int64_t> order((size_t)t.dim());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  int64_t reach = 0;
  for (const int64_t d : order) {
    if (t.size(d) <= 1) continue;
    if (t.stride(d) <= reach) return false;
    reach += (t.size(d) - 1) * t.stride(d);
  }
  return true;
}

// Dense weights into out [..., N, K], whose last dimension has stride 1. All rows of all matrices are shared out together: the
// blocks of a cache are many and small.
void dense_into(const Tensor& out, DType type, const PackedWeights& weights) {
  const int64_t E = weights.count(), N = weights.N(), K = weights.K();
  if (E * N == 0) return;
  const auto places = starts(out);
  auto* const data = (char*)out.mutable_data();
  const int64_t stride = out.stride(-2);
  parallel_over(E * N, 1, E * N * K, [&](int64_t a, int64_t b) {
    const Kernels& k = kernels();
    auto* line = (float*)scratch(4 * K + 64, Scratch::kernel);
    for (int64_t i = a; i < b;) {
      const int64_t e = i / N, first = i % N, last = std::min(N, first + b - i);
      char* to = data + (places[(size_t)e] + first * stride) * size_of(type);
      k.dequantize_rows(weights.at(e), first, last, type, to, stride, line);
      i += last - first;
    }
  });
}

// The type of the result; nothing where the kernels do not serve it or the format.
std::optional<DType> served(const PackedArguments& a, Scalar scalar) {
  return knows_format(a.format, a.nbits) ? dtype_of(scalar) : std::nullopt;
}

}  // namespace

bool dequantize(Call& c) {
  PackedArguments a;
  read_packed(c, a);
  read_settings(c, a);
  const Scalar scalar = scalar_of((int32_t)c.integer());
  const auto type = served(a, scalar);
  if (!type) return false;
  const PackedWeights weights(a, 0, 0);
  std::vector<int64_t> sizes(a.qdata.sizes().begin(), a.qdata.sizes().end());
  sizes.back() = weights.K();
  Tensor out = empty(sizes, scalar);
  dense_into(out, *type, weights);
  c.give(std::move(out));
  return true;
}

bool dequantize_into(Call& c) {
  PackedArguments a;
  const Tensor out = c.tensor();
  read_packed(c, a);
  read_settings(c, a);
  const auto type = served(a, out.scalar());
  if (!type) return false;
  const PackedWeights weights(a, 0, 0);
  std::vector<int64_t> sizes(a.qdata.sizes().begin(), a.qdata.sizes().end());
  sizes.back() = weights.K();
  const Sizes want(sizes);
  HQQ_CHECK(out.sizes() == want && (out.stride(-1) == 1 || sizes.back() == 1) && no_overlap(out), "dequantize: out must be ",
            want, " with the numbers of a row beside each other and none sharing memory, got ", out, ", strides ",
            out.strides());
  dense_into(out, *type, weights);
  return true;
}

bool embedding(Call& c) {
  PackedArguments a;
  const Tensor indices = c.tensor();
  read_packed(c, a);
  read_settings(c, a);
  const Scalar scalar = scalar_of((int32_t)c.integer());
  const auto type = served(a, scalar);
  if (!type) return false;
  const PackedWeights weights(a, 2, 0);
  HQQ_CHECK(is_integer(indices.scalar()), "embedding: indices must be integers, got ", indices);
  const Weight w = weights.at(0);
  const auto rows = integers_of(indices);
  for (const int64_t row : rows) HQQ_CHECK(row >= 0 && row < w.N, "embedding: index ", row, " is not in 0 to ", w.N - 1);
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(w.K);
  Tensor out = empty(sizes, scalar);
  auto* const data = (char*)out.mutable_data();
  const auto count = (int64_t)rows.size();
  parallel_over(count, 1, count * w.K, [&](int64_t first, int64_t last) {
    auto* line = (float*)scratch(4 * w.K + 64, Scratch::kernel);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = rows[(size_t)i];
      kernels().dequantize_rows(w, row, row + 1, *type, data + i * w.K * size_of(*type), w.K, line);
    }
  });
  c.give(std::move(out));
  return true;
}

}  // namespace hqqtensor
