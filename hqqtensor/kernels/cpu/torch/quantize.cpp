// Solving and packing whole matrices for Python: groups gathered into lanes, threads shared out.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <vector>

#include "dispatch/kernels.h"
#include "dispatch/threads.h"
#include "torch/operators.h"

namespace hqqtensor {
namespace {

struct Matrix {
  Matrices memory;
  const char* data;
  DType type;
  int64_t N, K, stride;  // stride in numbers

  explicit Matrix(const Tensor& w) {
    const auto found = dtype_of(w.scalar());
    HQQ_CHECK(w.dim() == 2 && w.size(0) >= 1 && w.size(1) >= 1 && found && w.is_cpu(),
              "weights must be float32, float16 or bfloat16 [N, K] on the CPU, got ", w, " on ", w.device());
    memory = matrices_of(w);
    data = memory.data, type = *found;
    N = w.size(0), K = w.size(1), stride = memory.row_stride / size_of(type);
  }
  // A contiguous tensor of any shape as a matrix of this one.
  Matrix(const Tensor& t, int64_t rows, int64_t columns)
      : data((const char*)t.data()), type(*dtype_of(t.scalar())), N(rows), K(columns), stride(columns) {}

  const char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * (type == DType::f32 ? 4 : 2); }
  // `count` numbers from there on as float32: these, or a copy in `line`.
  const float* floats(const char* from, int64_t count, std::vector<float>& line) const {
    if (type == DType::f32) return (const float*)from;
    kernels().to_float(from, type, count, line.data());
    return line.data();
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
  const auto& start = g.start;
  const auto& index = g.index;
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, groups = kPiece * lanes, item = size_of(w.type);
  parallel_for(0, (count + groups - 1) / groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> block((size_t)(std::max<int64_t>(size, 2) * lanes)), line((size_t)std::max(size, lanes)),
        s((size_t)lanes), z((size_t)lanes);
    for (int64_t i = first * groups; i < std::min(last * groups, count); i += lanes) {
      const int64_t real = g.real(i);
      if (step == item) {                      // along rows: numbers of a group are neighbours
        for (int64_t l = 0; l < lanes; ++l) {  // missing groups repeat the first: any numbers will do
          const float* in = w.floats(start(i + (l < real ? l : 0)), size, line);
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
void solve_part(const Matrix& w, std::string_view solver, int nbits, const G& g, float* inverse, float* zero) {
  if (g.count == 0) return;
  const Kernels& k = kernels();
  if (solver != "hqq") {
    const Solver which = solver == "rtn" ? Solver::rtn : Solver::joint;
    solve_groups(w, g, which == Solver::rtn, inverse, zero,
                 [&](float* block, int64_t size, int64_t, float* s, float* z, int64_t) {
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
  const int64_t groups = (extent - 1) / group_size + 1;
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

std::vector<int64_t> scales_shape(const Matrix& w, int64_t group_size, int64_t axis) {
  const int64_t groups = ((axis == 1 ? w.K : w.N) - 1) / group_size + 1;
  return axis == 1 ? std::vector<int64_t>{w.N, groups} : std::vector<int64_t>{groups, w.K};
}

// What codes stand for at scale 1, as an operator takes it: values and thresholds, floating-point [L] and [L - 1] or a row of
// them for every row of the weight; the code of each level, uint8 [L]; for floating-point formats the bits of the mantissa
// (else -1, and L <= 16) and the smallest number with a leading one.
struct LevelArguments {
  Tensor values, thresholds, codes;
  int64_t mantissa;
  double least;

  explicit LevelArguments(Call& c)
      : values(c.tensor()), thresholds(c.tensor()), codes(c.tensor()), mantissa(c.integer()), least(c.real()) {
    const int64_t count = values.dim() >= 1 ? values.size(-1) : 0, rows = count ? values.numel() / count : 0;
    HQQ_CHECK(count >= 2 && rows >= 1 && is_floating(values.scalar()) && is_floating(thresholds.scalar()) &&
                  thresholds.dim() >= 1 && thresholds.size(-1) == count - 1 && thresholds.numel() == rows * (count - 1) &&
                  codes.scalar() == Scalar::uint8 && codes.dim() == 1 && codes.size(0) == count && codes.is_contiguous(),
              "levels must be floating-point with as many uint8 codes and one threshold fewer, got ", values, ", ", codes,
              " and ", thresholds);
    HQQ_CHECK(mantissa >= 0 ? rows == 1 && mantissa <= 8 && least > 0 : count <= 16,
              "levels must be up to 16, or those of a floating-point format, got ", values);
  }
};

// Levels of each row, or of all.
std::vector<Levels> levels_of(const LevelArguments& l) {
  const int64_t count = l.values.size(-1);
  const Tensor values = plain_floats(l.values), thresholds = plain_floats(l.thresholds);
  const auto *from = (const float*)values.data(), *between = (const float*)thresholds.data();
  const auto* codes = (const uint8_t*)l.codes.data();
  std::vector<Levels> out((size_t)(l.values.numel() / count));
  for (Levels& to : out) {
    to.symmetric = true;
    for (int64_t i = 0; i < count; ++i) to.symmetric &= from[i] == -from[count - 1 - i];
    to.first = from[0], to.last = from[count - 1];
    to.mantissa = (int)l.mantissa, to.least = (float)l.least;
    to.sign = codes[0] & ~codes[count - 1];  // lowest and highest differ by it
    for (int64_t i = 0; l.mantissa < 0 && i < 16; ++i) {
      to.values[i] = from[std::min(i, count - 1)];
      to.codes[i] = codes[std::min(i, count - 1)];
    }
    for (int64_t i = 0; l.mantissa < 0 && i < 32; ++i) to.thresholds[i] = i < count - 1 ? between[i] : INFINITY;
    from += count, between += count - 1;
  }
  return out;
}

void check_geometry(int64_t nbits, int64_t group_size, int64_t axis) {
  HQQ_CHECK(nbits >= 1 && nbits <= 8, "nbits must be 1 to 8, got ", nbits);
  HQQ_CHECK(group_size >= 1, "group_size must be 1 or more, got ", group_size);
  HQQ_CHECK(axis == 0 || axis == 1, "axis must be 0 or 1, got ", axis);
}

Tensor checked_scales(const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
  HQQ_CHECK(is_floating(t.scalar()) && t.sizes() == shape, name, " must be floating-point ", shape, ", got ", t);
  return plain_floats(t);
}

// Nearest codes, packed into out; without levels the integers with zero points.
void assign_rows(const Tensor& out, const Tensor& weight, const Tensor& inverse, const Tensor& zero_point,
                 const std::vector<Levels>& levels, int64_t nbits, int64_t group_size, int64_t axis) {
  check_geometry(nbits, group_size, axis);
  const Matrix w(weight);
  const auto shape = scales_shape(w, group_size, axis);
  const Tensor s = checked_scales(inverse, "the inverse scale", shape);
  const Tensor z = zero_point ? checked_scales(zero_point, "zero_point", shape) : s.borrow();
  HQQ_CHECK(levels.size() <= 1 || (int64_t)levels.size() == w.N, "levels of ", (int64_t)levels.size(), " rows for ", w.N);
  const int64_t bytes = (w.K + 7) / 8 * nbits;
  HQQ_CHECK(out.scalar() == Scalar::uint8 && out.is_cpu() && out.dim() == 2 && out.size(0) == w.N && out.size(1) == bytes &&
                out.is_contiguous(),
            "out must be contiguous uint8 [", w.N, ", ", bytes, "] on the CPU, got ", out);
  auto* to = (uint8_t*)out.mutable_data();
  const auto *sp = (const float*)s.data(), *zp = (const float*)z.data();
  parallel_for(0, w.N, std::max<int64_t>(1, 65536 / w.K), [&](int64_t a, int64_t b) {
    const Kernels& k = kernels();
    std::vector<float> line(w.type == DType::f32 ? 0 : (size_t)w.K);
    for (int64_t n = a; n < b; ++n) {
      const float* in = w.floats(w.at(n, 0), w.K, line);
      const int64_t meta = (axis == 1 ? n : n % shape[0]) * shape[1];
      const Levels* l = levels.empty() ? nullptr : &levels[levels.size() == 1 ? 0 : (size_t)n];
      k.assign_row(l, in, sp + meta, zp + meta, w.K, (int)nbits, group_size, (int)axis, to + n * bytes);
    }
  });
}

// What one round of Lloyd's rule adds up: the error, and by code the sums of scale * weight and of scale^2.
constexpr int64_t kSums = 33;

// Rows `first` to `first + columns` of sums [rows, pieces, kSums], added up over the pieces in order: [rows, columns].
Tensor totals(const std::vector<double>& sums, int64_t rows, int64_t first, int64_t columns) {
  Tensor out = empty(std::vector<int64_t>{rows, columns}, Scalar::float32);
  auto* to = (float*)out.mutable_data();
  const int64_t pieces = (int64_t)sums.size() / (rows * kSums);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double total = 0;
      for (int64_t p = 0; p < pieces; ++p) total += sums[(size_t)((r * pieces + p) * kSums + first + c)];
      *to++ = (float)total;
    }
  return out;
}

constexpr int64_t kSpreadPieces = 64;  // of rows: sums of columns do not depend on the number of threads

// 1 over the largest weight, or a finite number where that is infinite; 0 where all weights are 0.
float unit_of(const Matrix& w, int64_t rows, int64_t pieces) {
  std::vector<float> largest((size_t)pieces);
  parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    std::vector<float> line((size_t)w.K);
    for (int64_t p = first; p < last; ++p)
      for (int64_t n = p * rows; n < std::min((p + 1) * rows, w.N); ++n) {
        float low, high;
        kernels().extremes(w.floats(w.at(n, 0), w.K, line), w.K, &low, &high);
        largest[(size_t)p] = std::max({largest[(size_t)p], -low, high});
      }
  });
  const float most = *std::max_element(largest.begin(), largest.end());
  return most > 0 ? std::min(1 / most, 1e38f) : 0;
}

}  // namespace

bool column_spread(Call& c) {
  const Tensor weight = c.tensor();
  const int64_t rounds = c.integer();
  HQQ_CHECK(rounds >= 1 && rounds <= 1000, "rounds must be 1 to 1000, got ", rounds);
  const Matrix w(weight);
  const int64_t rows = (w.N - 1) / kSpreadPieces + 1, pieces = (w.N - 1) / rows + 1;
  const float unit = unit_of(w, rows, pieces);
  std::vector<float> inverse((size_t)w.K, 1.0f), sums((size_t)(pieces * w.K));
  Tensor out = empty(std::vector<int64_t>{w.K}, Scalar::float32);
  auto* column = (float*)out.mutable_data();
  for (int64_t round = 0; round < rounds; ++round) {
    parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        float* to = sums.data() + p * w.K;
        std::fill_n(to, w.K, 0.0f);
        kernels().spread_rows(w.at(p * rows, 0), w.type, std::min(rows, w.N - p * rows), w.stride * size_of(w.type), w.K, unit,
                              inverse.data(), to);
      }
    });
    std::fill_n(column, w.K, 0.0f);
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t i = 0; i < w.K; ++i) column[i] += sums[(size_t)(p * w.K + i)];
    for (int64_t i = 0; i < w.K; ++i) {
      column[i] /= (float)w.N;
      inverse[(size_t)i] = column[i] > 0 ? 1 / column[i] : 1;
    }
  }
  c.give(std::move(out));
  return true;
}

bool solve(Call& c) {
  const Tensor weight = c.tensor();
  const int64_t nbits = c.integer(), group_size = c.integer(), axis = c.integer();
  const std::string_view solver = c.text();
  check_geometry(nbits, group_size, axis);
  HQQ_CHECK(solver == "rtn" || solver == "hqq_joint" || solver == "hqq", "there is no kernel for solver '", solver, "'");
  const Matrix w(weight);
  const auto shape = scales_shape(w, group_size, axis);
  Tensor inverse = empty(shape, Scalar::float32), zero = empty(shape, Scalar::float32);
  auto *s = (float*)inverse.mutable_data(), *z = (float*)zero.mutable_data();
  over_parts(w, group_size, axis, false, [&](const auto& part) { solve_part(w, solver, (int)nbits, part, s, z); });
  c.give(std::move(inverse));
  c.give(std::move(zero));
  return true;
}

bool solve_levels(Call& c) {
  const Tensor weight = c.tensor();
  const std::vector<Levels> rows = levels_of(LevelArguments(c));
  const int64_t group_size = c.integer(), axis = c.integer();
  const std::string_view solver = c.text();
  check_geometry(8, group_size, axis);
  HQQ_CHECK(solver == "rtn" || solver == "hqq_joint", "there is no kernel for solver '", solver, "'");
  const Matrix w(weight);
  const bool by_row = rows.size() > 1;
  HQQ_CHECK(!by_row || ((int64_t)rows.size() == w.N && axis == 1), "levels of ", (int64_t)rows.size(), " rows for ", w.N,
            ", axis ", axis);
  Tensor inverse = empty(scales_shape(w, group_size, axis), Scalar::float32);
  auto* s = (float*)inverse.mutable_data();
  const Kernels& k = kernels();
  const Solver which = solver == "rtn" ? Solver::rtn : Solver::joint;
  over_parts(w, group_size, axis, by_row, [&](const auto& part) {
    const int64_t columns = part.count / w.N;
    solve_groups(w, part, which == Solver::rtn, s, nullptr,
                 [&](float* block, int64_t size, int64_t, float* found, float*, int64_t first) {
                   k.solve_levels(rows[by_row ? (size_t)(first / columns) : 0], which, block, size, found);
                 });
  });
  c.give(std::move(inverse));
  return true;
}

bool lloyd(Call& c) {
  const Tensor groups = c.tensor(), scales = c.tensor();
  const LevelArguments arguments(c);
  const std::vector<Levels> rows = levels_of(arguments);
  HQQ_CHECK(groups.dim() == 3 && groups.scalar() == Scalar::float32 && groups.is_contiguous() && groups.is_cpu() &&
                groups.numel() > 0,
            "groups must be contiguous float32 [R, C, group] on the CPU, got ", groups);
  const int64_t R = groups.size(0), C = groups.size(1), size = groups.size(2), count = arguments.values.size(-1);
  const Tensor given = checked_scales(scales, "scales", {R, C});
  const bool by_row = rows.size() > 1;
  HQQ_CHECK((!by_row || (int64_t)rows.size() == R) && rows[0].mantissa < 0, "levels of ", (int64_t)rows.size(), " rows for ",
            R);
  for (int64_t i = 0; i < count; ++i)
    HQQ_CHECK(rows[0].codes[i] == i, "codes of a codebook must be 0 to ", count - 1, ", got ", (int64_t)rows[0].codes[i]);
  const Kernels& k = kernels();
  const Matrix w(groups, 1, groups.numel());
  Tensor better = converted(given, Scalar::float32);
  auto* s = (float*)better.mutable_data();
  // Sums of a piece of groups each, added up in order: the number of threads does not matter.
  const int64_t all = R * C / (int64_t)rows.size(), piece = kPiece * k.lanes, pieces = (all + piece - 1) / piece;
  std::vector<double> sums(rows.size() * (size_t)(pieces * kSums));
  parallel_for(0, (int64_t)rows.size(), 1, [&](int64_t a, int64_t b) {
    for (int64_t row = a; row < b; ++row)
      solve_groups(w,
                   Groups{all, size, 4, [&](int64_t i) { return std::min<int64_t>(k.lanes, all - i); },
                          [&](int64_t i) { return w.at(0, (row * all + i) * size); }, [&](int64_t i) { return row * all + i; },
                          all * size},
                   false, s, nullptr, [&](float* block, int64_t, int64_t real, float* found, float*, int64_t first) {
                     for (int64_t l = 0; l < k.lanes; ++l) found[l] = s[row * all + first + (l < real ? l : 0)];
                     double* sum = sums.data() + (row * pieces + first / piece) * kSums;
                     k.lloyd_block(rows[(size_t)row], block, size, real, found, sum, sum + 1, sum + 17);
                   });
  });
  const auto count_rows = (int64_t)rows.size();
  // All before the first is given: what was given is lost where a later one has no memory.
  Tensor errors = totals(sums, count_rows, 0, 1), top = totals(sums, count_rows, 1, count);
  Tensor bottom = totals(sums, count_rows, 17, count);
  c.give(std::move(errors));
  c.give(std::move(better));
  c.give(std::move(top));
  c.give(std::move(bottom));
  return true;
}

bool assign(Call& c) {
  const Tensor out = c.tensor(), weight = c.tensor(), inverse = c.tensor(), zero_point = c.tensor();
  const int64_t nbits = c.integer(), group_size = c.integer(), axis = c.integer();
  assign_rows(out, weight, inverse, zero_point, {}, nbits, group_size, axis);
  return true;
}

bool assign_levels(Call& c) {
  const Tensor out = c.tensor(), weight = c.tensor(), inverse = c.tensor();
  const std::vector<Levels> levels = levels_of(LevelArguments(c));
  const int64_t nbits = c.integer(), group_size = c.integer(), axis = c.integer();
  assign_rows(out, weight, inverse, {}, levels, nbits, group_size, axis);
  return true;
}

}  // namespace hqqtensor
