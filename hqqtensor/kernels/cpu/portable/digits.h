// Plain C++: activations rounded to integers of one to three digits.
#pragma once
#include "portable/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

inline float f_largest(const float* p, int64_t count) {
  float top = 0;
  for (int64_t i = 0; i < count; ++i) top = std::fabs(p[i]) > top ? std::fabs(p[i]) : top;
  for (int64_t i = 0; i < count; ++i)
    if (p[i] != p[i]) return p[i];
  return top;
}
inline void f_store_digits(int8_t* out, const Floats& v, int shift, int count, int64_t by_digit, int64_t) {
  const int32_t base = 1 << shift;
  for (int i = 0; i < kFloats; ++i) {
    int32_t x = (int32_t)lrintf(v.v[i]);
    for (int d = count - 1; d > 0; --d) {
      const int32_t low = ((x + base / 2) & (base - 1)) - base / 2;
      out[by_digit * d + i] = (int8_t)low;
      x = (x - low) / base;
    }
    out[i] = (int8_t)x;
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
