// Solving and packing whole matrices for Python: groups gathered into lanes, threads shared out.
#include "quantize.h"

#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"

namespace hqqtensor {
namespace {

DType dtype_of(const at::Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16,
              "weights must be float32, float16 or bfloat16, got ", t.scalar_type());
  return t.scalar_type() == at::kFloat ? DType::f32 : t.scalar_type() == at::kHalf ? DType::f16 : DType::bf16;
}

struct Matrix {
  at::Tensor keep;
  const char* data;
  DType type;
  int64_t N, K, stride;

  explicit Matrix(const at::Tensor& w) {
    TORCH_CHECK(w.dim() == 2 && w.device().is_cpu(), "expected a matrix on the CPU, got ", w.sizes(), " on ", w.device());
    keep = w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
    data = (const char*)keep.const_data_ptr();
    type = dtype_of(keep);
    N = w.size(0), K = w.size(1), stride = keep.stride(0);
  }
  const char* at(int64_t row, int64_t column) const {
    return data + (row * stride + column) * (type == DType::f32 ? 4 : 2);
  }
};

// Groups `first` to `last` of one size along rows: group i starts at `start(i)`.
template <class Start, class Index>
void solve_rows(const Matrix& w, int solver, int nbits, int64_t size, int64_t first, int64_t last, const Start& start,
                const Index& index, float* inverse, float* zero) {
  const Kernels& k = kernels();
  const int lanes = k.lanes;
  std::vector<float> block((size_t)(size * lanes)), line((size_t)size), s((size_t)lanes), z((size_t)lanes);
  for (int64_t i = first; i < last; i += lanes) {
    const int64_t count = std::min<int64_t>(lanes, last - i);
    for (int64_t l = 0; l < lanes; ++l) {  // missing groups repeat the first: any numbers will do
      const char* from = start(i + (l < count ? l : 0));
      const float* in = (const float*)from;
      if (w.type != DType::f32) {
        k.to_float(from, w.type, size, line.data());
        in = line.data();
      }
      for (int64_t j = 0; j < size; ++j) block[(size_t)(j * lanes + l)] = in[j];
    }
    k.solve_block(solver, block.data(), size, nbits, s.data(), z.data());
    for (int64_t l = 0; l < count; ++l) {
      inverse[index(i + l)] = s[(size_t)l];
      zero[index(i + l)] = z[(size_t)l];
    }
  }
}

// Groups of axis 0: rows g, g + groups, ... of each column; lanes are neighbouring columns.
void solve_columns(const Matrix& w, int solver, int nbits, int64_t groups, int64_t g, float* inverse, float* zero) {
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, size = (w.N - g + groups - 1) / groups;
  std::vector<float> block((size_t)(size * lanes)), s((size_t)lanes), z((size_t)lanes);
  for (int64_t column = 0; column < w.K; column += lanes) {
    const int64_t count = std::min<int64_t>(lanes, w.K - column);
    for (int64_t j = 0; j < size; ++j) {
      float* out = block.data() + j * lanes;
      k.to_float(w.at(g + j * groups, column), w.type, count, out);
      for (int64_t l = count; l < lanes; ++l) out[l] = out[0];
    }
    k.solve_block(solver, block.data(), size, nbits, s.data(), z.data());
    std::copy_n(s.data(), count, inverse + g * w.K + column);
    std::copy_n(z.data(), count, zero + g * w.K + column);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& weight, int64_t nbits, int64_t group_size, int64_t axis,
                                         const std::string& solver) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8 && group_size >= 1 && (axis == 0 || axis == 1), "bad geometry");
  TORCH_CHECK(solver == "rtn" || solver == "hqq_joint", "no kernel for solver ", solver);
  const Matrix w(weight);
  const int which = solver == "rtn" ? 0 : 1;
  const int64_t extent = axis == 1 ? w.K : w.N, groups = (extent + group_size - 1) / group_size;
  const auto options = at::TensorOptions().dtype(at::kFloat);
  at::Tensor inverse = axis == 1 ? at::empty({w.N, groups}, options) : at::empty({groups, w.K}, options);
  at::Tensor zero = at::empty_like(inverse);
  float *s = inverse.mutable_data_ptr<float>(), *z = zero.mutable_data_ptr<float>();
  if (axis == 0) {
    at::parallel_for(0, groups, 1, [&](int64_t a, int64_t b) {
      for (int64_t g = a; g < b; ++g) solve_columns(w, which, (int)nbits, groups, g, s, z);
    });
    return {inverse, zero};
  }
  const int64_t full = w.K / group_size, rest = w.K % group_size, lanes = kernels().lanes;
  // Blocks of whole lanes, so that how groups are shared out does not depend on the number of threads.
  const auto run = [&](int64_t count, int64_t size, const auto& start, const auto& index) {
    at::parallel_for(0, (count + lanes - 1) / lanes, std::max<int64_t>(1, 4096 / (size * lanes)), [&](int64_t a, int64_t b) {
      solve_rows(w, which, (int)nbits, size, a * lanes, std::min(b * lanes, count), start, index, s, z);
    });
  };
  run(w.N * full, group_size, [&](int64_t i) { return w.at(i / full, i % full * group_size); },
      [&](int64_t i) { return i / full * groups + i % full; });
  if (rest)
    run(w.N, rest, [&](int64_t i) { return w.at(i, full * group_size); }, [&](int64_t i) { return i * groups + full; });
  return {inverse, zero};
}

void assign(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const at::Tensor& zero_point, int64_t nbits,
                  int64_t group_size, int64_t axis) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8 && group_size >= 1 && (axis == 0 || axis == 1), "bad geometry");
  const Matrix w(weight);
  const int64_t extent = axis == 1 ? w.K : w.N, groups = (extent + group_size - 1) / group_size;
  const at::Tensor s = inverse.to(at::kFloat).contiguous(), z = zero_point.to(at::kFloat).contiguous();
  const std::vector<int64_t> shape = axis == 1 ? std::vector<int64_t>{w.N, groups} : std::vector<int64_t>{groups, w.K};
  TORCH_CHECK(s.sizes() == shape && z.sizes() == shape, "scales must be ", at::IntArrayRef(shape), ", got ", s.sizes(),
              " and ", z.sizes());
  const int64_t bytes = (w.K + 7) / 8 * nbits;
  TORCH_CHECK(out.scalar_type() == at::kByte && out.is_contiguous() && out.device().is_cpu() && out.dim() == 2 &&
              out.size(0) == w.N && out.size(1) == bytes, "out must be contiguous uint8 ", w.N, " x ", bytes);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const float *sp = s.const_data_ptr<float>(), *zp = z.const_data_ptr<float>();
  at::parallel_for(0, w.N, std::max<int64_t>(1, 65536 / w.K), [&](int64_t a, int64_t b) {
    const Kernels& k = kernels();
    std::vector<float> line(w.type == DType::f32 ? 0 : (size_t)w.K);
    for (int64_t n = a; n < b; ++n) {
      const float* in = (const float*)w.at(n, 0);
      if (w.type != DType::f32) {
        k.to_float(w.at(n, 0), w.type, w.K, line.data());
        in = line.data();
      }
      const int64_t meta = axis == 1 ? n * groups : n % groups * w.K;
      k.assign_row(in, sp + meta, zp + meta, w.K, (int)nbits, group_size, (int)axis, to + n * bytes);
    }
  });
}

}  // namespace hqqtensor
