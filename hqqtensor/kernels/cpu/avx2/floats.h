// AVX2 with FMA and F16C: vectors of 8 float32.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "avx2/target.h"
#include "dispatch/kernels.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kFloats = 8;
using Floats = __m256;

inline Floats f_zero() { return _mm256_setzero_ps(); }
inline Floats f_set(float v) { return _mm256_set1_ps(v); }
inline Floats f_load(const float* p) { return _mm256_loadu_ps(p); }
inline void f_store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void f_store_pairs(float* p, Floats a, Floats b) {  // a0 b0 a1 b1 ...
  const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
inline Floats f_add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats f_sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats f_mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats f_div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats f_fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats f_fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
inline Floats f_min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats f_max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats f_round(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats f_abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// a where c < 0, else b.
inline Floats f_pick(Floats c, Floats a, Floats b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(c, _mm256_setzero_ps(), _CMP_LT_OQ));
}
// The power of two in each number: its sign and mantissa taken away.
inline Floats f_power(Floats a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000))); }
inline float f_sum(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float f_hmax(Floats v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float f_hmin(Floats v) { return -f_hmax(_mm256_sub_ps(_mm256_setzero_ps(), v)); }
// 8 bytes, or their low (PART 1) or high (2) nibbles.
template <int PART = 0>
inline Floats f_codes(const uint8_t* p) {
  __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (PART == 1) v = _mm256_and_si256(v, _mm256_set1_epi32(15));
  if constexpr (PART == 2) v = _mm256_srli_epi32(v, 4);
  return _mm256_cvtepi32_ps(v);
}
// The first n of them (n < 8), zeros behind; nothing else is read.
inline Floats f_load_some(const float* p, int64_t n) {
  alignas(32) static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(ones + 8 - n)));
}
template <int PART>
inline Floats f_codes_some(const uint8_t* p, int64_t n) {
  uint8_t bytes[8] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return f_codes<PART>(bytes);
}
// table[code] for 8 codes, all below `entries`.
inline Floats f_lookup(const uint8_t* codes, const float* table, int entries) {
  const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
  if (entries == 16) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  return _mm256_i32gather_ps(table, index, 4);
}
inline __m128i to_bytes(__m256i v) {  // the low byte of each of 8 lanes, in the low 8 bytes
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i b = _mm256_shuffle_epi8(v, pick);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
}
inline void f_to_codes(Floats v, uint8_t* p) { _mm_storel_epi64((__m128i*)p, to_bytes(_mm256_cvtps_epi32(v))); }
// Which of up to 16 levels a number belongs to: the number of thresholds below it, found in four comparisons.
class Search {
 public:
  explicit Search(const Levels& l) : half_(_mm256_set1_ps(l.thresholds[7])), codes_(_mm_loadu_si128((const __m128i*)l.codes)) {
    for (int i = 0; i < 8; ++i) {  // an index found so far looks up its next threshold
      quarter_[i] = l.thresholds[i % 2 * 8 + 3];
      eighth_[i] = l.thresholds[i % 4 * 4 + 1];
      last_[i] = l.thresholds[i * 2];
    }
    low_ = _mm256_loadu_ps(l.values);
    high_ = _mm256_loadu_ps(l.values + 8);
  }
  Floats value(Floats x) const {
    const __m256i i = index(x);
    const __m256 low = _mm256_permutevar8x32_ps(low_, i), high = _mm256_permutevar8x32_ps(high_, i);
    return _mm256_blendv_ps(low, high, _mm256_cmp_ps(x, half_, _CMP_GT_OQ));
  }
  void codes(Floats x, uint8_t* p) const { _mm_storel_epi64((__m128i*)p, _mm_shuffle_epi8(codes_, to_bytes(index(x)))); }

 private:
  static __m256i bit(Floats x, Floats threshold) {  // -1 or 0
    return _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
  }
  static __m256i next(__m256i index, Floats x, __m256 table) {
    return _mm256_sub_epi32(_mm256_add_epi32(index, index), bit(x, _mm256_permutevar8x32_ps(table, index)));
  }
  __m256i index(Floats x) const {
    const __m256i i = _mm256_sub_epi32(_mm256_setzero_si256(), bit(x, half_));
    return next(next(next(i, x, quarter_), x, eighth_), x, last_);
  }
  Floats half_, quarter_, eighth_, last_, low_, high_;
  __m128i codes_;
};
inline Floats f_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void f_store_f16(uint16_t* p, Floats v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline Floats f_load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void f_store_bf16(uint16_t* p, Floats v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i all =
      _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q))), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }  // see avx512/vec.h

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
