// Plain C++: vectors of 8 float32. The compiler makes of the loops what it can.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dispatch/kernels.h"
#include "portable/target.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kFloats = 8;

struct Floats {
  float v[kFloats];
};
template <class F>
inline Floats each(F f) {
  Floats r;
  for (int i = 0; i < kFloats; ++i) r.v[i] = f(i);
  return r;
}
inline Floats f_set(float v) {
  return each([&](int) { return v; });
}
inline Floats f_zero() { return f_set(0); }
inline Floats f_load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void f_store(float* p, const Floats& v) { std::memcpy(p, v.v, sizeof v.v); }
inline void f_store_pairs(float* p, const Floats& a, const Floats& b) {  // a0 b0 a1 b1 ...
  for (int i = 0; i < kFloats; ++i) {
    p[2 * i] = a.v[i];
    p[2 * i + 1] = b.v[i];
  }
}
inline Floats f_add(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats f_sub(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats f_mul(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats f_div(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats f_fma(const Floats& a, const Floats& b, const Floats& c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Floats f_fnma(const Floats& a, const Floats& b, const Floats& c) {  // c - a b
  return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
}
inline Floats f_min(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats f_max(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats f_abs(const Floats& a) {
  return each([&](int i) { return std::fabs(a.v[i]); });
}
// Adding and taking away 1.5 * 2^23 rounds to even; numbers of 2^22 and more are left (codes never get there).
inline Floats f_round(const Floats& a) {
  return each([&](int i) {
    const float big = 12582912.0f;
    return std::fabs(a.v[i]) < 4194304.0f ? (a.v[i] + big) - big : a.v[i];
  });
}
// a where c < 0, else b.
inline Floats f_pick(const Floats& c, const Floats& a, const Floats& b) {
  return each([&](int i) { return c.v[i] < 0 ? a.v[i] : b.v[i]; });
}
// The power of two in each number: its sign and mantissa taken away.
inline Floats f_power(const Floats& a) {
  Floats r;
  for (int i = 0; i < kFloats; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    bits &= 0x7f800000;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline float f_sum(const Floats& a) {
  float s = 0;
  for (float v : a.v) s += v;
  return s;
}
inline float f_hmax(const Floats& a) {
  float s = a.v[0];
  for (float v : a.v) s = v > s ? v : s;
  return s;
}
inline float f_hmin(const Floats& a) {
  float s = a.v[0];
  for (float v : a.v) s = v < s ? v : s;
  return s;
}
// Bytes, or their low (PART 1) or high (2) nibbles.
template <int PART = 0>
inline Floats f_codes(const uint8_t* p) {
  return each([&](int i) { return (float)(PART == 0 ? p[i] : PART == 1 ? p[i] & 15 : p[i] >> 4); });
}
// The first n of them, zeros behind.
inline Floats f_load_some(const float* p, int64_t n) {
  return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
template <int PART>
inline Floats f_codes_some(const uint8_t* p, int64_t n) {
  uint8_t bytes[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return f_codes<PART>(bytes);
}
inline Floats f_lookup(const uint8_t* codes, const float* table, int) {
  return each([&](int i) { return table[codes[i]]; });
}
inline void f_to_codes(const Floats& v, uint8_t* p) {
  for (int i = 0; i < kFloats; ++i) p[i] = (uint8_t)lrintf(v.v[i]);
}
// Which of up to 16 levels a number belongs to: the number of thresholds below it.
class Search {
 public:
  explicit Search(const Levels& l) : l_(l) {}
  Floats value(const Floats& x) const {
    int32_t found[kFloats];
    index(x, found);
    return each([&](int i) { return l_.values[found[i]]; });
  }
  void codes(const Floats& x, uint8_t* p) const {
    int32_t found[kFloats];
    index(x, found);
    for (int i = 0; i < kFloats; ++i) p[i] = l_.codes[found[i]];
  }

 private:
  void index(const Floats& x, int32_t* found) const {
    for (int i = 0; i < kFloats; ++i) found[i] = 0;
    for (int t = 0; t < 15; ++t)
      for (int i = 0; i < kFloats; ++i) found[i] += x.v[i] > l_.thresholds[t];
  }
  const Levels& l_;
};
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 5.9604644775390625e-8f;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits >= 0x7f800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal in half: units of 2^-24, rounded to even
    float a;
    std::memcpy(&a, &bits, 4);
    return sign | (uint16_t)lrintf(a * 16777216.0f);
  }
  return sign | (uint16_t)((bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13);
}
inline Floats f_load_f16(const uint16_t* p) {
  return each([&](int i) { return half_to_float(p[i]); });
}
inline void f_store_f16(uint16_t* p, const Floats& v) {
  for (int i = 0; i < kFloats; ++i) p[i] = float_to_half(v.v[i]);
}
inline Floats f_load_bf16(const uint16_t* p) {
  return each([&](int i) {
    const uint32_t bits = (uint32_t)p[i] << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  });
}
inline void f_store_bf16(uint16_t* p, const Floats& v) {
  for (int i = 0; i < kFloats; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &v.v[i], 4);
    p[i] = v.v[i] == v.v[i] ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (uint16_t)((bits >> 16) | 0x40);
  }
}
inline void prefetch(const void*) {}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
