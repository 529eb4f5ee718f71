// Scales of groups whose codes stand for fixed levels, many groups at a time as in generic/solve.h.
// hqqtensor/solvers/scale_only.py describes what is computed.
#pragma once
#include <type_traits>

#include "generic/levels.h"
#include "generic/solve.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// The smallest scale, in size, with which no weight lies beyond the outermost levels; with the levels mirrored if `sign` < 0.
inline Floats reaching_scale(const Range& r, const Levels& l, float sign) {
  const Floats low = sign < 0 ? f_sub(f_zero(), r.high) : r.low, high = sign < 0 ? f_sub(f_zero(), r.low) : r.high;
  const Floats below = l.first < 0 ? f_div(low, f_set(l.first)) : f_zero();
  const Floats above = l.last > 0 ? f_div(high, f_set(l.last)) : f_zero();
  return f_mul(f_max(f_max(below, above), f_zero()), f_set(sign));
}

constexpr float kFractions[] = {0.55f, 0.594f, 0.639f, 0.684f, 0.728f, 0.773f, 0.817f, 0.862f, 0.906f, 0.951f, 1.0f, 1.04f};
constexpr float kMoves[] = {1.03f, 0.97f};

template <class Nearest>
struct Scales {
  const Nearest& nearest;
  const float* w;  // in units of the group's largest weight
  int64_t size;

  // The error of s with the nearest codes, and the best scale for those codes.
  Floats step(Floats s, Floats& better) const {
    const Floats inverse = f_div(f_set(1), s);
    Floats error = f_zero(), top = f_zero(), bottom = f_zero();
    for (int64_t j = 0; j < size; ++j) {
      const Floats v = f_load(w + j * kFloats), t = nearest.value(f_mul(v, inverse)), r = f_fnma(t, s, v);
      error = f_fma(r, r, error);
      top = f_fma(v, t, top);
      bottom = f_fma(t, t, bottom);
    }
    better = f_div(top, bottom);
    // All codes are zero, or the scale changed its sign: the regression says nothing, so the old scale stays.
    better = f_pick(f_sub(f_zero(), f_mul(better, s)), better, s);
    return error;
  }

  void settle(Floats& best_error, Floats& best, Floats s, int steps) const {
    for (int i = 0; i < steps; ++i) {
      Floats better;
      const Floats error = step(s, better), change = f_sub(error, best_error);
      best = f_pick(change, s, best);
      best_error = f_pick(change, error, best_error);
      s = better;
    }
  }

  Floats search(const Levels& l, const Range& range) const {
    Floats error = f_set(3e38f), best = f_set(1);
    for (float sign = 1; sign >= (l.symmetric ? 1.0f : -1.0f); sign -= 2) {
      Floats reach = reaching_scale(range, l, sign);
      reach = f_pick(f_mul(reach, f_set(-sign)), reach, f_set(sign));  // none: any will do
      for (const float fraction : kFractions) settle(error, best, f_mul(reach, f_set(fraction)), 2);
    }
    settle(error, best, best, 2);
    for (const float move : kMoves) settle(error, best, f_mul(best, f_set(move)), 2);
    return best;
  }
};

// kFloats groups of `size` weights, w[j * kFloats + i] the j-th of group i (overwritten); infinite where all are zero.
void solve_levels(const Levels& l, Solver solver, float* w, int64_t size, float* inverse) {
  Range range = range_of(w, size);
  if (solver == Solver::rtn) return f_store(inverse, f_div(f_set(1), reaching_scale(range, l, 1)));
  const Floats largest = f_max(f_abs(range.low), f_abs(range.high)), nothing = f_sub(f_zero(), largest);
  const Floats unit = f_pick(nothing, largest, f_set(1));
  for (int64_t j = 0; j < size; ++j) f_store(w + j * kFloats, f_div(f_load(w + j * kFloats), unit));
  range.low = f_div(range.low, unit);
  range.high = f_div(range.high, unit);
  with_levels(l, [&](const auto& nearest) {
    const Floats scale = Scales<std::decay_t<decltype(nearest)>>{nearest, w, size}.search(l, range);
    f_store(inverse, f_div(f_set(1), f_pick(nothing, f_mul(scale, unit), f_zero())));
  });
}

void lloyd_block(const Levels& l, const float* w, int64_t size, int64_t count, float* scale, double* error, double* top,
                 double* bottom) {
  const Search nearest(l);
  Floats better;
  float errors[kFloats];
  f_store(errors, Scales<Search>{nearest, w, size}.step(f_load(scale), better));
  f_store(scale, better);
  // By code and lane, so that neighbours do not wait for each other's sums.
  float weights[16][kFloats] = {};
  int32_t counts[16][kFloats] = {};
  const Floats inverse = f_div(f_set(1), better);
  for (int64_t j = 0; j < size; ++j) {
    uint8_t codes[kFloats];
    nearest.codes(f_mul(f_load(w + j * kFloats), inverse), codes);
    for (int i = 0; i < kFloats; ++i) {
      weights[codes[i]][i] += w[j * kFloats + i];
      ++counts[codes[i]][i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const double s = scale[i];
    *error += (double)errors[i];
    for (int c = 0; c < 16; ++c) {
      top[c] += s * (double)weights[c][i];
      bottom[c] += s * s * (double)counts[c][i];
    }
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
