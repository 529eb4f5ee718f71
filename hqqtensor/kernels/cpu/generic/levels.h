// The nearest of a format's levels: by thresholds (Search, in vec_*.h), or by rounding as a floating-point unit does.
#pragma once
#include <cstdint>

#include "generic/vec_api.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// Floating-point numbers of few bits: the nearest, ties to even; what is beyond the largest becomes the largest.
class Minifloat {
 public:
  explicit Minifloat(const Levels& l)
      : first_(f_set(l.first)), last_(f_set(l.last)), least_(f_set(l.least)),
        shifter_(f_set(1.5f * (float)(1 << (23 - l.mantissa)))), mantissa_(l.mantissa), sign_((uint32_t)l.sign),
        smallest_(l.least) {}

  // Adding 1.5 * 2^(23 - mantissa) times x's own power of two leaves room for as many bits as the format has.
  Floats value(Floats x) const {
    const Floats inside = f_min(f_max(x, first_), last_);
    const Floats shifter = f_mul(f_max(f_power(inside), least_), shifter_);
    return f_sub(f_add(inside, shifter), shifter);
  }

  // Sign, exponent, mantissa; zero has no sign.
  void codes(Floats x, uint8_t* out) const {
    float v[kFloats];
    uint32_t code[kFloats];
    f_store(v, value(x));
    const int drop = 23 - mantissa_;
    const uint32_t sign = sign_, least = bits_of(smallest_) >> drop, leading = 1u << mantissa_;
    const float smallest = smallest_;
    for (int i = 0; i < kFloats; ++i) {
      const float size = __builtin_fabsf(v[i]);
      // Below the least power of two there is no leading one: it is added, and its exponent stays 0.
      const bool below = size < smallest;
      code[i] = (bits_of(size + (below ? smallest : 0.0f)) >> drop) - least + (below ? 0u : leading) + (v[i] < 0 ? sign : 0u);
    }
    for (int i = 0; i < kFloats; ++i) out[i] = (uint8_t)code[i];
  }

 private:
  static uint32_t bits_of(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    return bits;
  }
  Floats first_, last_, least_, shifter_;
  int mantissa_;
  uint32_t sign_;
  float smallest_;
};

// f with whatever finds the nearest of these levels.
template <class F>
inline void with_levels(const Levels& l, F f) {
  if (l.mantissa >= 0)
    f(Minifloat(l));
  else
    f(Search(l));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
