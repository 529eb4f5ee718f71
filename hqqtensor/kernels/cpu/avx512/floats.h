// AVX-512: vectors of 16 float32.
#pragma once
#include <cstdint>

#include "avx512/target.h"
#include "dispatch/kernels.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kFloats = 16;
using Floats = __m512;

inline Floats f_zero() { return _mm512_setzero_ps(); }
inline Floats f_set(float v) { return _mm512_set1_ps(v); }
inline Floats f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void f_store_pairs(float* p, Floats a, Floats b) {  // a0 b0 a1 b1 ...
  const __m512i i = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, i, b));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(i, _mm512_set1_epi32(8)), b));
}
inline Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats f_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats f_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats f_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats f_fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats f_fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats f_min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats f_max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats f_round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats f_abs(Floats a) { return _mm512_abs_ps(a); }
// a where c < 0, else b.
inline Floats f_pick(Floats c, Floats a, Floats b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
// The power of two in each number: its sign and mantissa taken away.
inline Floats f_power(Floats a) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7f800000)));
}
inline float f_sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float f_hmax(Floats a) { return _mm512_reduce_max_ps(a); }
inline float f_hmin(Floats a) { return _mm512_reduce_min_ps(a); }
// 16 bytes, or their low (PART 1) or high (2) nibbles.
template <int PART>
inline Floats from_bytes(__m128i bytes) {
  __m512i v = _mm512_cvtepu8_epi32(bytes);
  if constexpr (PART == 0) return _mm512_cvtepi32_ps(v);
  if constexpr (PART == 2) v = _mm512_srli_epi32(v, 4);
  // The table of all nibbles as numbers: its index is the low 4 bits alone.
  return _mm512_permutexvar_ps(v, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
template <int PART = 0>
inline Floats f_codes(const uint8_t* p) {
  return from_bytes<PART>(_mm_loadu_si128((const __m128i*)p));
}
// The first n of them (n < 16), zeros behind; nothing else is read.
inline Floats f_load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
template <int PART>
inline Floats f_codes_some(const uint8_t* p, int64_t n) {
  return from_bytes<PART>(_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p));
}
// table[code] for 16 codes, all below `entries`.
inline Floats f_lookup(const uint8_t* codes, const float* table, int entries) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
  if (entries <= 16) return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps((__mmask16)((1u << entries) - 1), table));
  return _mm512_i32gather_ps(index, table, 4);
}
inline void f_to_codes(Floats v, uint8_t* p) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }
// Which of up to 16 levels a number belongs to: the number of thresholds below it, found in four comparisons.
class Search {
 public:
  explicit Search(const Levels& l)
      : half_(_mm512_set1_ps(l.thresholds[7])), quarter_(_mm512_loadu_ps(l.thresholds + 3)),
        eighth_(_mm512_loadu_ps(l.thresholds + 1)), last_(_mm512_loadu_ps(l.thresholds)), values_(_mm512_loadu_ps(l.values)),
        codes_(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)l.codes))) {}
  Floats value(Floats x) const { return _mm512_permutexvar_ps(index(x), values_); }
  void codes(Floats x, uint8_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(index(x), codes_)));
  }

 private:
  static __m512i above(__m512i index, Floats x, Floats threshold, int step) {
    return _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ), index, _mm512_set1_epi32(step));
  }
  __m512i index(Floats x) const {
    __m512i i = above(_mm512_setzero_si512(), x, half_, 8);
    i = above(i, x, _mm512_permutexvar_ps(i, quarter_), 4);
    i = above(i, x, _mm512_permutexvar_ps(i, eighth_), 2);
    return above(i, x, _mm512_permutexvar_ps(i, last_), 1);
  }
  Floats half_, quarter_, eighth_, last_, values_;  // thresholds, where an index found so far looks them up
  __m512i codes_;
};
inline Floats f_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void f_store_f16(uint16_t* p, Floats v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats from_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline Floats f_load_bf16(const uint16_t* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
#define HQQTENSOR_HAS_SOME_HALVES
inline Floats f_load_f16_some(const uint16_t* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
inline Floats f_load_bf16_some(const uint16_t* p, int64_t n) {
  return from_bf16(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}
inline void f_store_bf16(uint16_t* p, Floats v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i all = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}

// Into the second level: aimed at the first, prefetches of a stream from memory wait for its few free slots (1.4 x slower).
// Not the intrinsic: GCC 12 takes a function that only prefetches for one without effects, and leaves out calls of it.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
