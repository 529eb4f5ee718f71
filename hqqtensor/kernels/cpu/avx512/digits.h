// AVX-512: activations rounded to integers of one to three digits.
#pragma once
#include "avx512/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

#define HQQTENSOR_HAS_CHUNK_STORE
// The largest magnitude of each of `count` chunks of 64 floats, up to 16, zero for those left; NaN where one is among them
// (its bits exceed all others'). Four steps halve 16 vectors of partial results, lanes from one meeting lanes from another.
inline void f_largest_each(const float* p, int64_t count, float* top) {
  __m512i t[16];
  for (int c = 0; c < 16; ++c) {
    t[c] = _mm512_setzero_si512();
    for (int i = 0; i < 64 && c < count; i += 16)
      t[c] = _mm512_max_epu32(t[c], _mm512_and_si512(_mm512_loadu_si512(p + 64 * c + i), _mm512_set1_epi32(0x7fffffff)));
  }
  const auto meet = [&](int half, __mmask16 mask, auto swap) __attribute__((always_inline)) {
    for (int c = 0; c < half; ++c)
      t[c] = _mm512_max_epu32(_mm512_mask_blend_epi32(mask, t[c], t[c + half]),
                              swap(_mm512_mask_blend_epi32(mask, t[c + half], t[c])));
  };
  meet(8, 0xFF00, [&](__m512i v) { return _mm512_shuffle_i32x4(v, v, 0x4E); });
  meet(4, 0xF0F0, [&](__m512i v) { return _mm512_shuffle_i32x4(v, v, 0xB1); });
  meet(2, 0xCCCC, [&](__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); });
  meet(1, 0xAAAA, [&](__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); });
  _mm512_storeu_si512(top, t[0]);
}

// Floats rounded to integers of `count` signed digits in base 2^shift, the highest first: digits by_digit bytes apart,
// every 4 numbers by_quad.
inline void f_store_digits(int8_t* out, Floats v, int shift, int count, int64_t by_digit, int64_t by_quad) {
  __m512i x = _mm512_cvtps_epi32(v);
  const auto put = [&](int8_t* to, __m128i b) {
    if (by_quad == 4) return _mm_storeu_si128((__m128i*)to, b);
    _mm_storeu_si32(to, b);
    _mm_storeu_si32(to + by_quad, _mm_srli_si128(b, 4));
    _mm_storeu_si32(to + 2 * by_quad, _mm_srli_si128(b, 8));
    _mm_storeu_si32(to + 3 * by_quad, _mm_srli_si128(b, 12));
  };
  if (shift == 8) {
    // Balanced digits: adding 0x80 to all but the top byte and flipping that bit back turns each byte into a signed digit in
    // [-128, 127]; the carry goes to the digit above.
    const __m512i half = _mm512_set1_epi32(count == 3 ? 0x8080 : count == 2 ? 0x80 : 0);
    x = _mm512_xor_si512(_mm512_add_epi32(x, half), half);
    put(out + by_digit * (count - 1), _mm512_cvtepi32_epi8(x));
    if (count > 1) put(out + by_digit * (count - 2), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
    if (count > 2) put(out, _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 16)));
    return;
  }
  const __m128i drop = _mm_cvtsi32_si128(32 - shift), by = _mm_cvtsi32_si128(shift);
  for (int d = count - 1; d > 0; --d) {
    const __m512i low = _mm512_sra_epi32(_mm512_sll_epi32(x, drop), drop);
    put(out + by_digit * d, _mm512_cvtepi32_epi8(low));
    x = _mm512_sra_epi32(_mm512_sub_epi32(x, low), by);
  }
  put(out, _mm512_cvtepi32_epi8(x));
}
// A chunk of 64 floats times `scale`, rounded to integers of COUNT digits of 8 bits, digits 64 bytes apart: bytes that belong
// to one digit are put together by shuffles within quarters of a vector, then from all of them.
template <int COUNT>
inline void f_store_chunk(int8_t* out, const float* in, float scale) {
  const auto number = [&](int i) { return _mm512_mul_ps(_mm512_loadu_ps(in + 16 * i), _mm512_set1_ps(scale)); };
  // Lane l of quarter q to lane 4 l + q.
  const __m512i transpose = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  if constexpr (COUNT == 3) {
    const __m512i half = _mm512_set1_epi32(0x8080);  // balanced digits, see f_store_digits
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(number(i)), half), bytes);
    // From two vectors: digit d in the lower half, the next higher one in the upper half.
    const auto two = [&](int i, int d) __attribute__((always_inline)) {
      const __m512i index = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
      return _mm512_permutex2var_epi32(v[i], _mm512_add_epi32(index, _mm512_set1_epi32(d)), v[i + 1]);
    };
    const __m512i sign = _mm512_set1_epi8((char)0x80), a = two(0, 0), b = two(2, 0);
    _mm512_storeu_si512(out, _mm512_shuffle_i64x2(two(0, 2), two(2, 2), 0x44));
    _mm512_storeu_si512(out + 64, _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0xEE), sign));
    _mm512_storeu_si512(out + 128, _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x44), sign));
    return;
  }
  // Added to a number of up to 22 bits, this leaves the integer in the low bits of the sum.
  const __m512 magic = _mm512_set1_ps(12582912.0f + (COUNT == 2 ? 128 : 0));
  __m512i v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm512_castps_si512(_mm512_add_ps(number(i), magic));
  const auto words = [&](int i, int by) { return _mm512_mask_blend_epi16(0xAAAAAAAA, v[i], _mm512_slli_epi32(v[i + by], 16)); };
  if constexpr (COUNT == 2) {
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 13, 9, 5, 1, 14, 10, 6, 2, 12, 8, 4, 0));
    const __m512i a = _mm512_shuffle_epi8(words(0, 1), pairs), b = _mm512_shuffle_epi8(words(2, 1), pairs);
    const __m512i low = _mm512_set_epi32(29, 25, 21, 17, 28, 24, 20, 16, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(a, high, b));
    _mm512_storeu_si512(out + 64, _mm512_xor_si512(_mm512_permutex2var_epi32(a, low, b), _mm512_set1_epi8((char)0x80)));
    return;
  }
  const __m512i all = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, words(0, 2), _mm512_slli_epi32(words(1, 2), 8));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(transpose, _mm512_shuffle_epi8(all, bytes)));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
