// Solving and packing whole matrices for Python: groups gathered into lanes, threads shared out.
#include "quantize.h"

#include <ATen/Parallel.h>

#include <functional>
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

// What solves a block of groups, kernels().lanes of them with `count` real ones, w[j * lanes + l] the j-th of group l.
using SolveBlock = std::function<void(float* w, int64_t size, int64_t count, float* inverse, float* zero, int64_t piece)>;

constexpr int64_t kPiece = 256;  // blocks of lanes: what is summed over groups does not depend on the number of threads

// Groups of one size: group i of `count` begins at `start(i)`, its numbers are `step` bytes apart, its results go to place
// `index(i)`. Of the lanes from i on, `real(i)` hold groups.
template <class Real, class Start, class Index>
struct Groups {
  int64_t count, size, step;
  Real real;
  Start start;
  Index index;
  int64_t weights;  // in all of them
};

template <class G>
void solve_groups(const Matrix& w, const G& g, float* inverse, float* zero, const SolveBlock& solve) {
  const int64_t count = g.count, size = g.size, step = g.step;
  const auto &start = g.start, &index = g.index;
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, groups = kPiece * lanes, item = size_of(w.type);
  at::parallel_for(0, (count + groups - 1) / groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> block((size_t)(size * lanes)), line((size_t)std::max(size, lanes)), s((size_t)lanes), z((size_t)lanes);
    for (int64_t i = first * groups; i < std::min(last * groups, count); i += lanes) {
      const int64_t real = g.real(i);
      if (step == item) {  // along rows: numbers of a group are neighbours
        for (int64_t l = 0; l < lanes; ++l) {  // missing groups repeat the first: any numbers will do
          const float* in = (const float*)start(i + (l < real ? l : 0));
          if (w.type != DType::f32) {
            k.to_float(in, w.type, size, line.data());
            in = line.data();
          }
          for (int64_t j = 0; j < size; ++j) block[(size_t)(j * lanes + l)] = in[j];
        }
      } else {  // along columns: groups are
        for (int64_t j = 0; j < size; ++j) {
          float* out = block.data() + j * lanes;
          k.to_float(start(i) + j * step, w.type, real, out);
          for (int64_t l = real; l < lanes; ++l) out[l] = out[0];
        }
      }
      solve(block.data(), size, real, s.data(), z.data(), i / groups);
      for (int64_t l = 0; l < real; ++l) {
        inverse[index(i + l)] = s[(size_t)l];
        zero[index(i + l)] = z[(size_t)l];
      }
    }
  });
}

constexpr int kRounds = 20;  // of the published solver, at most

// Rounds until the mean error of all `count` groups no longer falls; the round that shows it counts as well.
int rounds_needed(const std::vector<double>& totals, int64_t weights) {
  float best = INFINITY;
  for (int round = 0; round < kRounds; ++round) {
    double total = 0;
    for (size_t i = (size_t)round; i < totals.size(); i += kRounds) total += totals[i];
    const float mean = (float)(total / (double)weights);
    if (!(mean < best)) return round + 1;
    best = mean;
  }
  return kRounds;
}

template <class G>
void solve_part(const Matrix& w, const std::string& solver, int nbits, const G& g, float* inverse, float* zero) {
  if (g.count == 0) return;
  const Kernels& k = kernels();
  if (solver != "hqq") {
    const int which = solver == "rtn" ? 0 : 1;
    solve_groups(w, g, inverse, zero, [&](float* block, int64_t size, int64_t, float* s, float* z, int64_t) {
      k.solve_block(which, block, size, nbits, s, z);
    });
    return;
  }
  // When to stop is a matter of all groups: all rounds once for their errors, then those needed for the results.
  std::vector<double> totals((size_t)((g.count + kPiece * k.lanes - 1) / (kPiece * k.lanes) * kRounds));
  int rounds = kRounds;
  const SolveBlock run = [&](float* block, int64_t size, int64_t real, float* s, float* z, int64_t piece) {
    k.hqq_block(block, size, real, nbits, rounds, s, z, totals.data() + piece * kRounds);
  };
  solve_groups(w, g, inverse, zero, run);
  rounds = rounds_needed(totals, g.weights);
  if (rounds < kRounds) solve_groups(w, g, inverse, zero, run);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& weight, int64_t nbits, int64_t group_size, int64_t axis,
                                         const std::string& solver) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8 && group_size >= 1 && (axis == 0 || axis == 1), "bad geometry");
  TORCH_CHECK(solver == "rtn" || solver == "hqq_joint" || solver == "hqq", "no kernel for solver ", solver);
  const Matrix w(weight);
  const int64_t extent = axis == 1 ? w.K : w.N, groups = (extent + group_size - 1) / group_size, item = size_of(w.type);
  const auto options = at::TensorOptions().dtype(at::kFloat);
  at::Tensor inverse = axis == 1 ? at::empty({w.N, groups}, options) : at::empty({groups, w.K}, options);
  at::Tensor zero = at::empty_like(inverse);
  float *s = inverse.mutable_data_ptr<float>(), *z = zero.mutable_data_ptr<float>();
  const int64_t lanes = kernels().lanes;
  const auto run = [&](const auto& part) { solve_part(w, solver, (int)nbits, part, s, z); };
  if (axis == 0) {
    // Lanes are neighbouring columns of one row of groups. Groups 0 .. rest - 1 have a number more.
    const int64_t rest = w.N % groups, columns = (w.K + lanes - 1) / lanes * lanes;
    const auto part = [&](int64_t first, int64_t rows, int64_t size) {
      run(Groups{rows * columns, size, groups * w.stride * item, [&](int64_t i) { return std::min(lanes, w.K - i % columns); },
                 [=, &w](int64_t i) { return w.at(first + i / columns, i % columns); },
                 [=, &w](int64_t i) { return (first + i / columns) * w.K + i % columns; }, rows * w.K * size});
    };
    part(0, rest, w.N / groups + 1);
    part(rest, groups - rest, w.N / groups);
    return {inverse, zero};
  }
  const int64_t full = w.K / group_size, rest = w.K % group_size;
  const auto part = [&](int64_t count, int64_t size, const auto& start, const auto& index) {
    run(Groups{count, size, item, [=](int64_t i) { return std::min(lanes, count - i); }, start, index, count * size});
  };
  part(w.N * full, group_size, [&](int64_t i) { return w.at(i / full, i % full * group_size); },
       [&](int64_t i) { return i / full * groups + i % full; });
  if (rest)
    part(w.N, rest, [&](int64_t i) { return w.at(i, full * group_size); }, [&](int64_t i) { return i * groups + full; });
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
