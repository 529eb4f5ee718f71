// The solvers, many groups at a time: lane i of a vector works on group i, so that nothing is summed across lanes and
// a group's divisions cost what one division costs. Weights lie as [size][kFloats]: a block of groups of one size fits
// the first-level cache for all its iterations. What is computed is described in hqqtensor/solvers/.
#pragma once
#include <cmath>
#include <cstdint>

#include "dispatch/kernels.h"
#include "generic/vec_api.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

inline Floats clamp_round(Floats v, Floats last) { return f_min(f_max(f_round(v), f_zero()), last); }

struct Range {
  Floats low, high;
};

inline Range range_of(const float* w, int64_t size) {
  Range r{f_load(w), f_load(w)};
  for (int64_t j = 1; j < size; ++j) {
    const Floats v = f_load(w + j * kFloats);
    r.low = f_min(r.low, v);
    r.high = f_max(r.high, v);
  }
  return r;
}

// Smallest and largest of `count` numbers side by side.
void extremes(const float* w, int64_t count, float* low, float* high) {
  int64_t i = 0;
  *low = *high = w[0];
  if (count >= kFloats) {
    Range r{f_load(w), f_load(w)};
    for (i = kFloats; i + kFloats <= count; i += kFloats) {
      const Floats v = f_load(w + i);
      r.low = f_min(r.low, v);
      r.high = f_max(r.high, v);
    }
    *low = f_hmin(r.low);
    *high = f_hmax(r.high);
  }
  for (; i < count; ++i) {
    *low = w[i] < *low ? w[i] : *low;
    *high = w[i] > *high ? w[i] : *high;
  }
}

// Groups whose weights are all the same: scale and zero that give that value from one code.
void fix_constant(const float* low, const float* high, float* scale, float* zero) {
  for (int i = 0; i < kFloats; ++i)
    if (!(high[i] - low[i] > 1.17549435e-38f)) {
      scale[i] = low[i] == 0 ? 1.0f : __builtin_fabsf(low[i]);
      zero[i] = low[i] < 0 ? 1.0f : 0.0f;
    }
}

void solve_rtn(const float* w, int64_t size, int nbits, float* inverse, float* zero) {
  const Range r = range_of(w, size);
  const Floats last = f_set((float)((1 << nbits) - 1));
  const Floats scale = f_sub(f_div(r.high, last), f_div(r.low, last));
  float s[kFloats], low[kFloats], high[kFloats];
  f_store(s, scale);
  f_store(low, r.low);
  f_store(high, r.high);
  f_store(zero, f_div(f_sub(f_zero(), r.low), scale));
  fix_constant(low, high, s, zero);
  f_store(inverse, f_div(f_set(1), f_load(s)));
}

// Scale and zero of each lane's group with the error they have.
struct Candidate {
  Floats error, s, z;
};

// Moves of the lower and the upper end of the range outwards, in codes.
constexpr float kEnds[6][2] = {{0.5f, 0}, {-0.5f, 0}, {0, 0.5f}, {0, -0.5f}, {0.15f, 0.15f}, {-0.15f, -0.15f}};

template <bool WEIGHTED>
struct Joint {
  const float* w;           // in units of the group's largest weight
  const float* importance;  // of the error of each number, sum 1, the same for all lanes; null unless WEIGHTED
  int64_t size;
  Floats last, middle, mean;

  // Error of (s, z) with the nearest codes, and the regression of w on those codes.
  Floats step(Floats s, Floats z, Floats& new_s, Floats& new_z) const {
    const Floats inverse = f_div(f_set(1), s), shift = f_sub(middle, z);
    Floats sum = f_zero(), squares = f_zero(), products = f_zero(), error = f_zero();
    for (int64_t j = 0; j < size; ++j) {
      const Floats v = f_load(w + j * kFloats);
      const Floats c = f_sub(clamp_round(f_fma(v, inverse, z), last), middle);  // centred: less is lost in sums
      const Floats r = f_sub(f_mul(f_add(c, shift), s), v);
      const Floats m = WEIGHTED ? f_set(importance[j]) : f_zero();
      const Floats weighted_c = WEIGHTED ? f_mul(m, c) : c, weighted_r = WEIGHTED ? f_mul(m, r) : r;
      sum = f_add(sum, weighted_c);
      squares = f_fma(weighted_c, c, squares);
      products = f_fma(weighted_c, v, products);
      error = f_fma(weighted_r, r, error);
    }
    const Floats count = f_set(WEIGHTED ? 1.0f : 1.0f / (float)size);
    const Floats code_mean = f_mul(sum, count);
    const Floats spread = f_sub(squares, f_mul(sum, code_mean));
    const Floats slope = f_div(f_sub(products, f_mul(sum, mean)), spread);
    // All codes equal, or a slope that is no usable number: the regression says nothing, keep what was.
    const Floats tiny = f_set(1e-20f);
    const Floats bad = f_sub(f_min(spread, slope), tiny);
    new_s = f_pick(bad, s, slope);
    new_z = f_pick(bad, z, f_sub(f_add(code_mean, middle), f_div(mean, slope)));
    return error;
  }

  // (s, z) in `best` wherever it is better there.
  static void keep(Candidate& best, Floats error, Floats s, Floats z) {
    const Floats worse = f_sub(best.error, error);  // below zero: the old one stays
    best.s = f_pick(worse, best.s, s);
    best.z = f_pick(worse, best.z, z);
    best.error = f_min(best.error, error);
  }

  Candidate search(Floats low, Floats high, int codes) const {
    const Floats centre = f_mul(f_add(low, high), f_set(0.5f)), half = f_mul(f_sub(high, low), f_set(0.5f));
    const float pull = 4.0f / (float)codes < 0.4f ? 4.0f / (float)codes : 0.4f;
    Candidate best{f_set(3e38f), f_set(1), f_zero()};
    Floats s, z;
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) {
        const Floats start = f_sub(centre, f_mul(half, f_set(1 - pull * (float)(2 - a) / 2)));
        const Floats end = f_fma(half, f_set(1 - pull * (float)(2 - b) / 2), centre);
        s = f_div(f_sub(end, start), last);
        z = f_div(f_sub(f_zero(), start), s);
        Floats s1, z1, s2, z2;
        step(s, z, s1, z1);
        keep(best, step(s1, z1, s2, z2), s1, z1);
      }
    settle(best, best.s, best.z, 3);
    for (const float* ends : kEnds) {
      const Floats wider = f_mul(best.s, f_set(1 + (ends[0] + ends[1]) / (float)codes));
      settle(best, wider, f_mul(f_add(best.z, f_set(ends[0])), f_div(best.s, wider)), 3);
    }
    return best;
  }

  void settle(Candidate& best, Floats s, Floats z, int steps) const {
    for (int i = 0; i < steps; ++i) {
      Floats next_s, next_z;
      keep(best, step(s, z, next_s, next_z), s, z);
      s = next_s;
      z = next_z;
    }
  }
};

template <bool WEIGHTED>
void solve_joint(float* w, const float* importance, int64_t size, int nbits, float* inverse, float* zero) {
  const Range r = range_of(w, size);
  float low[kFloats], high[kFloats], unit[kFloats], scale[kFloats];
  f_store(low, r.low);
  f_store(high, r.high);
  for (int i = 0; i < kFloats; ++i) {
    const bool flat = !(high[i] - low[i] > 1.17549435e-38f);
    const float a = __builtin_fabsf(low[i]), b = __builtin_fabsf(high[i]);
    unit[i] = flat ? 1.0f : a > b ? a : b;
  }
  const Floats units = f_load(unit);
  Floats total = f_zero();
  for (int64_t j = 0; j < size; ++j) {
    const Floats v = f_div(f_load(w + j * kFloats), units);
    f_store(w + j * kFloats, v);
    total = f_add(total, WEIGHTED ? f_mul(v, f_set(importance[j])) : v);
  }
  const int codes = (1 << nbits) - 1;
  const Floats mean = WEIGHTED ? total : f_mul(total, f_set(1.0f / (float)size));
  const Joint<WEIGHTED> joint{w, importance, size, f_set((float)codes), f_set((float)codes / 2), mean};
  Floats bottom = f_div(r.low, units), top = f_div(r.high, units);
  top = f_pick(f_sub(f_sub(top, bottom), f_set(1e-30f)), f_add(bottom, f_set(1)), top);  // flat: any range will do
  const Candidate best = joint.search(bottom, top, codes);
  f_store(scale, f_mul(best.s, units));
  f_store(zero, best.z);
  fix_constant(low, high, scale, zero);
  f_store(inverse, f_div(f_set(1), f_load(scale)));
}

// kFloats groups of `size` weights, w[j * kFloats + i] the j-th of group i (overwritten).
void solve_block(Solver solver, float* w, int64_t size, int nbits, float* inverse, float* zero) {
  if (solver == Solver::rtn)
    solve_rtn(w, size, nbits, inverse, zero);
  else
    solve_joint<false>(w, nullptr, size, nbits, inverse, zero);
}

// The joint solver where the squared error of number j counts importance[j] times; these sum to 1.
void solve_weighted_block(float* w, const float* importance, int64_t size, int nbits, float* inverse, float* zero) {
  solve_joint<true>(w, importance, size, nbits, inverse, zero);
}

// Error feedback within a group, as in hqqtensor/calibration/feedback.py: number after number is rounded, and row j of
// `upper` [size, size], rows `stride` numbers apart, takes its error out of the numbers after it. codes and errors lie as w.
void feed_back_block(float* w, const float* upper, int64_t stride, int64_t size, int nbits, const float* scale,
                     const float* zero, float* codes, float* errors) {
  const Floats s = f_load(scale), z = f_load(zero), last = f_set((float)((1 << nbits) - 1));
  float inverses[kFloats];
  for (int i = 0; i < kFloats; ++i) inverses[i] = scale[i] == 0 ? 0.0f : 1 / scale[i];
  const Floats inverse = f_load(inverses);
  for (int64_t j = 0; j < size; ++j) {
    const float* row = upper + j * stride;
    const Floats v = f_load(w + j * kFloats), code = clamp_round(f_add(f_mul(v, inverse), z), last);
    const Floats error = f_div(f_sub(v, f_mul(f_sub(code, z), s)), f_set(row[j]));
    f_store(codes + j * kFloats, code);
    f_store(errors + j * kFloats, error);
    for (int64_t k = j + 1; k < size; ++k)
      f_store(w + k * kFloats, f_sub(f_load(w + k * kFloats), f_mul(error, f_set(row[k]))));
  }
}

// The published half-quadratic solver, as in hqqtensor/solvers/hqq.py: scale from the range, then rounds on the zero point.
// The shrink threshold x = |x|^(p-1) / beta lies at 0.1^(1/1.3), about 0.17: below it the error variable is zero.
inline float hqq_shrink(float r) {
  const float size = __builtin_fabsf(r), less = size - 0.1f * powf(size, -0.3f);
  return less > 0 ? (r < 0 ? -less : less) : 0.0f;
}

void hqq_block(const float* w, int64_t size, int64_t count, int nbits, int rounds, float* inverse, float* zero,
               double* totals) {
  const Range range = range_of(w, size);
  const float most = (float)((1 << nbits) - 1);
  float low[kFloats], high[kFloats];
  f_store(low, range.low);
  f_store(high, range.high);
  for (int i = 0; i < kFloats; ++i) {
    const float spread = high[i] - low[i];
    const float s = spread <= 1e-4f ? 1.0f : (1 / spread) * most;  // as torch divides a number by a tensor
    inverse[i] = s < 2e4f ? s : 2e4f;
    zero[i] = -low[i] * inverse[i];
  }
  const Floats s = f_load(inverse), last = f_set(most), sizes = f_set((float)size);
  Floats z = nbits == 4 ? f_round(f_load(zero)) : f_load(zero);
  for (int round = 0; round < rounds; ++round) {
    Floats total = f_zero(), sum = f_zero();
    for (int64_t j = 0; j < size; ++j) {
      const Floats v = f_load(w + j * kFloats);
      const Floats codes = clamp_round(f_add(f_mul(v, s), z), last);
      const Floats r = f_sub(v, f_div(f_sub(codes, z), s));
      total = f_add(total, f_abs(r));
      Floats target = v;
      if (f_hmax(f_abs(r)) > 0.16f) {
        float error[kFloats];
        f_store(error, r);
        for (float& e : error) e = hqq_shrink(e);
        target = f_sub(v, f_load(error));
      }
      sum = f_add(sum, f_sub(codes, f_mul(target, s)));
    }
    z = f_div(sum, sizes);
    float sums[kFloats];
    f_store(sums, total);
    for (int64_t i = 0; i < count; ++i) totals[round] += (double)sums[i];
  }
  f_store(zero, z);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
