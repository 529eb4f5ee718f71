// Solving and packing whole matrices for Python: groups gathered into lanes, threads shared out.
#include "torch/quantize.h"

#include <ATen/Parallel.h>

#include <functional>
#include <vector>

#include "dispatch/kernels.h"

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

// What solves a block of groups, kernels().lanes of them with `count` real ones from group `first` on, w[j * lanes + l] the
// j-th of group l.
using SolveBlock = std::function<void(float* w, int64_t size, int64_t count, float* inverse, float* zero, int64_t first)>;

constexpr int64_t kPiece = 64;  // blocks of lanes: what is summed over groups does not depend on the number of threads

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

// `by_range`: the solver looks at no more than the smallest and the largest weight of a group; it may be given those alone.
template <class G>
void solve_groups(const Matrix& w, const G& g, bool by_range, float* inverse, float* zero, const SolveBlock& solve) {
  const int64_t count = g.count, size = g.size, step = g.step;
  const auto &start = g.start, &index = g.index;
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, groups = kPiece * lanes, item = size_of(w.type);
  at::parallel_for(0, (count + groups - 1) / groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> block((size_t)(std::max<int64_t>(size, 2) * lanes)), line((size_t)std::max(size, lanes)), s((size_t)lanes), z((size_t)lanes);
    for (int64_t i = first * groups; i < std::min(last * groups, count); i += lanes) {
      const int64_t real = g.real(i);
      if (step == item) {  // along rows: numbers of a group are neighbours
        for (int64_t l = 0; l < lanes; ++l) {  // missing groups repeat the first: any numbers will do
          const float* in = (const float*)start(i + (l < real ? l : 0));
          if (w.type != DType::f32) {
            k.to_float(in, w.type, size, line.data());
            in = line.data();
          }
          if (by_range)
            k.extremes(in, size, &block[(size_t)l], &block[(size_t)(lanes + l)]);
          else
            for (int64_t j = 0; j < size; ++j) block[(size_t)(j * lanes + l)] = in[j];
        }
      } else {  // along columns: groups are
        for (int64_t j = 0; j < size; ++j) {
          float* out = block.data() + j * lanes;
          k.to_float(start(i) + j * step, w.type, real, out);
          for (int64_t l = real; l < lanes; ++l) out[l] = out[0];
        }
      }
      solve(block.data(), by_range && step == item ? 2 : size, real, s.data(), z.data(), i);
      for (int64_t l = 0; l < real; ++l) {
        inverse[index(i + l)] = s[(size_t)l];
        if (zero) zero[index(i + l)] = z[(size_t)l];
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
    const Solver which = solver == "rtn" ? Solver::rtn : Solver::joint;
    solve_groups(w, g, which == Solver::rtn, inverse, zero, [&](float* block, int64_t size, int64_t, float* s, float* z, int64_t) {
      k.solve_block(which, block, size, nbits, s, z);
    });
    return;
  }
  // When to stop is a matter of all groups: all rounds once for their errors, then those needed for the results.
  std::vector<double> totals((size_t)((g.count + kPiece * k.lanes - 1) / (kPiece * k.lanes) * kRounds));
  int rounds = kRounds;
  const SolveBlock run = [&](float* block, int64_t size, int64_t real, float* s, float* z, int64_t first) {
    k.hqq_block(block, size, real, nbits, rounds, s, z, totals.data() + first / (kPiece * k.lanes) * kRounds);
  };
  solve_groups(w, g, false, inverse, zero, run);
  rounds = rounds_needed(totals, g.weights);
  if (rounds < kRounds) solve_groups(w, g, false, inverse, zero, run);
}

// All groups of w, by parts of one size: run(part). `by_row`: no block of lanes holds groups of two rows (axis 1).
template <class Run>
void over_parts(const Matrix& w, int64_t group_size, int64_t axis, bool by_row, const Run& run) {
  const int64_t lanes = kernels().lanes, item = size_of(w.type), extent = axis == 1 ? w.K : w.N;
  const int64_t groups = (extent + group_size - 1) / group_size;
  const auto filled = [&](int64_t count) { return (count + lanes - 1) / lanes * lanes; };
  if (axis == 0) {
    // Lanes are neighbouring columns of one row of groups. Groups 0 .. rest - 1 have a number more.
    const int64_t rest = w.N % groups, columns = filled(w.K);
    const auto part = [&](int64_t first, int64_t rows, int64_t size) {
      run(Groups{rows * columns, size, groups * w.stride * item, [&](int64_t i) { return std::min(lanes, w.K - i % columns); },
                 [=, &w](int64_t i) { return w.at(first + i / columns, i % columns); },
                 [=, &w](int64_t i) { return (first + i / columns) * w.K + i % columns; }, rows * w.K * size});
    };
    part(0, rest, w.N / groups + 1);
    part(rest, groups - rest, w.N / groups);
    return;
  }
  // Groups first .. first + count - 1 of every row.
  const auto part = [&](int64_t first, int64_t count, int64_t size) {
    const int64_t columns = by_row ? filled(count) : count, all = w.N * columns;
    run(Groups{all, size, item, [=](int64_t i) { return std::min(lanes, by_row ? count - i % columns : all - i); },
               [=, &w](int64_t i) { return w.at(i / columns, (first + i % columns) * group_size); },
               [=](int64_t i) { return i / columns * groups + first + i % columns; }, w.N * count * size});
  };
  const int64_t full = w.K / group_size, rest = w.K % group_size;
  if (full) part(0, full, group_size);
  if (rest) part(full, 1, rest);
}

at::Tensor scales_like(const Matrix& w, int64_t group_size, int64_t axis) {
  const int64_t groups = ((axis == 1 ? w.K : w.N) + group_size - 1) / group_size;
  const auto options = at::TensorOptions().dtype(at::kFloat);
  return axis == 1 ? at::empty({w.N, groups}, options) : at::empty({groups, w.K}, options);
}

// Levels of each row, or of all.
std::vector<Levels> levels_of(const LevelTensors& l) {
  const auto& [values, thresholds, codes, mantissa, least] = l;
  const int64_t count = values.size(-1);
  const at::Tensor v = values.reshape({-1, count}).to(at::kFloat).contiguous();
  const at::Tensor t = thresholds.reshape({-1, count - 1}).to(at::kFloat).contiguous(), c = codes.contiguous();
  TORCH_CHECK(count >= 2 && v.size(0) == t.size(0) && c.scalar_type() == at::kByte && c.dim() == 1 && c.size(0) == count,
              "levels must have as many codes and one threshold fewer, got ", values.sizes(), ", ", codes.sizes(), " and ",
              thresholds.sizes());
  TORCH_CHECK(mantissa >= 0 ? v.size(0) == 1 && mantissa <= 8 && least > 0 : count <= 16,
              "levels must be up to 16, or those of a floating-point format, got ", values.sizes());
  std::vector<Levels> out((size_t)v.size(0));
  for (int64_t row = 0; row < v.size(0); ++row) {
    const float *from = v.const_data_ptr<float>() + row * count, *between = t.const_data_ptr<float>() + row * (count - 1);
    Levels& to = out[(size_t)row];
    to.symmetric = true;
    for (int64_t i = 0; i < count; ++i) to.symmetric &= from[i] == -from[count - 1 - i];
    to.first = from[0], to.last = from[count - 1];
    to.mantissa = (int)mantissa, to.least = (float)least;
    to.sign = c.const_data_ptr<uint8_t>()[0] & ~c.const_data_ptr<uint8_t>()[count - 1];  // lowest and highest differ by it
    if (mantissa >= 0) continue;
    for (int64_t i = 0; i < 16; ++i) {
      to.values[i] = from[std::min(i, count - 1)];
      to.codes[i] = c.const_data_ptr<uint8_t>()[std::min(i, count - 1)];
    }
    for (int64_t i = 0; i < 32; ++i) to.thresholds[i] = i < count - 1 ? between[i] : INFINITY;
  }
  return out;
}

void check_geometry(int64_t nbits, int64_t group_size, int64_t axis) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8 && group_size >= 1 && (axis == 0 || axis == 1), "bad geometry");
}

// Nearest codes, packed; without levels the integers with zero points.
void assign_rows(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const at::Tensor* zero_point,
                 const std::vector<Levels>& levels, int64_t nbits, int64_t group_size, int64_t axis) {
  check_geometry(nbits, group_size, axis);
  const Matrix w(weight);
  const int64_t extent = axis == 1 ? w.K : w.N, groups = (extent + group_size - 1) / group_size;
  const at::Tensor s = inverse.to(at::kFloat).contiguous(), z = zero_point ? zero_point->to(at::kFloat).contiguous() : s;
  const std::vector<int64_t> shape = axis == 1 ? std::vector<int64_t>{w.N, groups} : std::vector<int64_t>{groups, w.K};
  TORCH_CHECK(s.sizes() == shape && z.sizes() == shape, "scales must be ", at::IntArrayRef(shape), ", got ", s.sizes(),
              " and ", z.sizes());
  TORCH_CHECK(levels.size() <= 1 || (int64_t)levels.size() == w.N, "levels of ", levels.size(), " rows for ", w.N);
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
      const Levels* l = levels.empty() ? nullptr : &levels[levels.size() == 1 ? 0 : (size_t)n];
      k.assign_row(l, in, sp + meta, zp + meta, w.K, (int)nbits, group_size, (int)axis, to + n * bytes);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& weight, int64_t nbits, int64_t group_size, int64_t axis,
                                         const std::string& solver) {
  check_geometry(nbits, group_size, axis);
  TORCH_CHECK(solver == "rtn" || solver == "hqq_joint" || solver == "hqq", "no kernel for solver ", solver);
  const Matrix w(weight);
  const at::Tensor inverse = scales_like(w, group_size, axis), zero = at::empty_like(inverse);
  float *s = inverse.mutable_data_ptr<float>(), *z = zero.mutable_data_ptr<float>();
  over_parts(w, group_size, axis, false, [&](const auto& part) { solve_part(w, solver, (int)nbits, part, s, z); });
  return {inverse, zero};
}

at::Tensor solve_levels(const at::Tensor& weight, int64_t group_size, int64_t axis, const std::string& solver,
                        const LevelTensors& levels) {
  check_geometry(8, group_size, axis);
  TORCH_CHECK(solver == "rtn" || solver == "hqq_joint", "no kernel for solver ", solver);
  const Matrix w(weight);
  const std::vector<Levels> rows = levels_of(levels);
  const bool by_row = rows.size() > 1;
  TORCH_CHECK(!by_row || ((int64_t)rows.size() == w.N && axis == 1), "levels of ", rows.size(), " rows for ", w.N, ", axis ", axis);
  const at::Tensor inverse = scales_like(w, group_size, axis);
  float* s = inverse.mutable_data_ptr<float>();
  const Kernels& k = kernels();
  const Solver which = solver == "rtn" ? Solver::rtn : Solver::joint;
  over_parts(w, group_size, axis, by_row, [&](const auto& part) {
    const int64_t columns = part.count / w.N;
    solve_groups(w, part, which == Solver::rtn, s, nullptr, [&](float* block, int64_t size, int64_t, float* found, float*, int64_t first) {
      k.solve_levels(rows[by_row ? (size_t)(first / columns) : 0], which, block, size, found);
    });
  });
  return inverse;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lloyd(const at::Tensor& groups, const at::Tensor& scales,
                                                                 const LevelTensors& levels) {
  const std::vector<Levels> rows = levels_of(levels);
  TORCH_CHECK(groups.dim() == 3 && groups.scalar_type() == at::kFloat && groups.is_contiguous() && scales.dim() == 2 &&
                  scales.size(0) == groups.size(0) && scales.size(1) == groups.size(1),
              "expected groups float32 [R, C, group] and scales [R, C], got ", groups.sizes(), " and ", scales.sizes());
  const int64_t R = groups.size(0), C = groups.size(1), size = groups.size(2), count = std::get<0>(levels).size(-1);
  const bool by_row = rows.size() > 1;
  TORCH_CHECK((!by_row || (int64_t)rows.size() == R) && rows[0].mantissa < 0, "levels of ", rows.size(), " rows for ", R);
  const Kernels& k = kernels();
  const Matrix w(groups.view({1, -1}));
  const at::Tensor better = scales.to(at::kFloat).contiguous().clone();
  float* s = better.mutable_data_ptr<float>();
  // Sums of a piece of groups each, added up in order: the number of threads does not matter.
  const int64_t all = R * C / (int64_t)rows.size(), piece = kPiece * k.lanes, pieces = (all + piece - 1) / piece;
  constexpr int64_t kSums = 33;  // error, top, bottom
  std::vector<double> sums(rows.size() * (size_t)(pieces * kSums));
  at::parallel_for(0, (int64_t)rows.size(), 1, [&](int64_t a, int64_t b) {
    for (int64_t row = a; row < b; ++row)
      solve_groups(w, Groups{all, size, 4, [&](int64_t i) { return std::min<int64_t>(k.lanes, all - i); },
                             [&](int64_t i) { return w.at(0, (row * all + i) * size); },
                             [&](int64_t i) { return row * all + i; }, all * size},
                   false, s, nullptr, [&](float* block, int64_t, int64_t real, float* found, float*, int64_t first) {
                     for (int64_t l = 0; l < k.lanes; ++l) found[l] = s[row * all + first + (l < real ? l : 0)];
                     double* sum = sums.data() + (row * pieces + first / piece) * kSums;
                     k.lloyd_block(rows[(size_t)row], block, size, real, found, sum, sum + 1, sum + 17);
                   });
  });
  const at::Tensor totals = at::from_blob(sums.data(), {(int64_t)rows.size(), pieces, kSums}, at::kDouble).sum(1).to(at::kFloat);
  return {totals.slice(1, 0, 1), better, totals.slice(1, 1, 1 + count), totals.slice(1, 17, 17 + count)};
}

void assign(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const at::Tensor& zero_point,
            int64_t nbits, int64_t group_size, int64_t axis) {
  assign_rows(out, weight, inverse, &zero_point, {}, nbits, group_size, axis);
}

void assign_levels(const at::Tensor& out, const at::Tensor& weight, const at::Tensor& inverse, const LevelTensors& levels,
                   int64_t nbits, int64_t group_size, int64_t axis) {
  assign_rows(out, weight, inverse, nullptr, levels_of(levels), nbits, group_size, axis);
}

}  // namespace hqqtensor
