// AVX2: activations rounded to integers of one to three digits.
#pragma once
#include "avx2/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// The largest magnitude of `count` floats, a multiple of 8; NaN where one is among them (its bits exceed all others').
inline float f_largest(const float* p, int64_t count) {
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8)
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + i)), _mm256_set1_epi32(0x7fffffff)));
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xB1));
  return _mm_cvtss_f32(_mm_castsi128_ps(t));
}

// Floats rounded to integers of `count` signed digits in base 2^shift, the highest first, digits by_digit bytes apart. In
// tiles (by_quad other than 4): 4 integers of 16 bits (by_digit 0) or 8 bits by_quad bytes apart.
inline void f_store_digits(int8_t* out, Floats v, int shift, int count, int64_t by_digit, int64_t by_quad) {
  if (by_quad != 4) {
    const __m256i x = _mm256_cvtps_epi32(v);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    if (by_digit == 0) {
      _mm_storel_epi64((__m128i*)out, pairs);
      _mm_storeh_pd((double*)(out + by_quad), _mm_castsi128_pd(pairs));
    } else {
      const __m128i bytes = _mm_packs_epi16(pairs, pairs);
      _mm_storeu_si32(out, bytes);
      _mm_storeu_si32(out + by_quad, _mm_srli_si128(bytes, 4));
    }
    return;
  }
  const __m128i drop = _mm_cvtsi32_si128(32 - shift), by = _mm_cvtsi32_si128(shift);
  __m256i x = _mm256_cvtps_epi32(v);
  for (int d = count - 1; d > 0; --d) {
    const __m256i low = _mm256_sra_epi32(_mm256_sll_epi32(x, drop), drop);
    _mm_storel_epi64((__m128i*)(out + by_digit * d), to_bytes(low));
    x = _mm256_sra_epi32(_mm256_sub_epi32(x, low), by);
  }
  _mm_storel_epi64((__m128i*)out, to_bytes(x));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
