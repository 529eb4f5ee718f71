// AVX-512 with VNNI: a chunk of 64 codes is one vector of bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "dispatch/kernels.h"

namespace {

constexpr int kRows = 4, kMaxTokens = 1;      // tile of linear_rows: rows of the weight x rows of the activations
constexpr int kPanelRows = 6, kPanelTokens = 4;  // tile of linear_dense
constexpr int kFloats = 16;

using Codes = __m512i;
using Floats = __m512;
struct Acc {
  __m512 v;
};

constexpr int digit_shift(int) { return 8; }

// Plane of P bits, half H of a block of 128 codes, its bits moved to bit L of each byte; the other bits are noise.
template <int P, int L, int H>
inline __m512i plane(const uint8_t* b) {
  if constexpr (P == 8) {
    return _mm512_loadu_si512(b + 64 * H);
  } else if constexpr (P == 4) {
    const __m512i v = _mm512_loadu_si512(b);
    constexpr int r = (4 * H - L) & 31;
    return r == 0 ? v : _mm512_ror_epi32(v, r);
  } else if constexpr (P == 2) {
    const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)b));
    constexpr int r0 = (4 * H - L) & 31, r1 = (4 * H + 2 - L) & 31;
    return _mm512_rorv_epi32(v, _mm512_set_epi32(r1, r1, r1, r1, r1, r1, r1, r1, r0, r0, r0, r0, r0, r0, r0, r0));
  } else {
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)b));
    constexpr int r = 4 * H - L;
    constexpr int a = r & 31, c = (r + 1) & 31, d = (r + 2) & 31, e = (r + 3) & 31;
    return _mm512_rorv_epi32(v, _mm512_set_epi32(e, e, e, e, d, d, d, d, c, c, c, c, a, a, a, a));
  }
}

inline __m512i select(int mask, __m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), low, high, 0xCA);
}

// Codes [64 H, 64 H + 64) of the block at b.
template <int NB, int H>
inline Codes decode(const uint8_t* b) {
  if constexpr (NB == 8) return plane<8, 0, H>(b);
  __m512i v;
  if constexpr (NB == 1) v = plane<1, 0, H>(b);
  if constexpr (NB == 2) v = plane<2, 0, H>(b);
  if constexpr (NB == 3) v = select(3, plane<2, 0, H>(b), plane<1, 2, H>(b + 32));
  if constexpr (NB == 4) v = plane<4, 0, H>(b);
  if constexpr (NB == 5) v = select(15, plane<4, 0, H>(b), plane<1, 4, H>(b + 64));
  if constexpr (NB == 6) v = select(15, plane<4, 0, H>(b), plane<2, 4, H>(b + 64));
  if constexpr (NB == 7)
    v = select(15, plane<4, 0, H>(b), select(48, plane<2, 4, H>(b + 64), plane<1, 6, H>(b + 96)));
  return _mm512_and_si512(v, _mm512_set1_epi8((1 << NB) - 1));
}

inline Codes load_codes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

struct Tokens {  // the digits of one chunk of activations
  __m512i d[3];
};
template <int D>
inline Tokens load_tokens(const int8_t* p) {
  Tokens t;
  for (int d = 0; d < D; ++d) t.d[d] = _mm512_load_si512(p + 64 * d);
  return t;
}

inline Codes lookup(Codes c, const uint8_t* table16) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table16)), c);
}

// sum over the 4 codes of each lane of code * activation, as one integer; exact (see digit_limit). DW > 1: codes of DW
// digits of 7 bits; what falls below the last digit kept is left out.
template <int D, int DW>
inline __m512i dot(const Codes* c, const Tokens& t) {
  constexpr int W = DW ? DW : 1;
  __m512i a = _mm512_setzero_si512();
  for (int level = 0; level < (D > DW ? D : DW); ++level) {
    if (level) a = _mm512_slli_epi32(a, DW > 1 ? 7 : 8);
    for (int d = 0; d < D; ++d)
      if (level - d >= 0 && level - d < W) a = _mm512_dpbusd_epi32(a, c[level - d], t.d[d]);
  }
  return a;
}

inline __m512 scaled(__m512 acc, __m512i sum, __m512 scale) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc); }
template <int NB, int D, int DW>
inline void add_chunk(Acc& acc, const Codes* c, const Tokens& t, const float* scale) {
  acc.v = scaled(acc.v, dot<D, DW>(c, t), _mm512_set1_ps(*scale));
}
struct LaneScales {  // which of a chunk's 64 / group_size scales each lane takes, and of a block's (see avx512/pairs.h)
  __m512i index, pair;
  explicit LaneScales(int64_t group_size) {
    alignas(64) int32_t lane[16], pairs[16];
    for (int i = 0; i < 16; ++i) {
      lane[i] = (int32_t)(4 * i / group_size);
      pairs[i] = lane[i] + (i % 2 ? (int32_t)(64 / group_size) : 0);
    }
    index = _mm512_load_si512(lane);
    pair = _mm512_load_si512(pairs);
  }
};
template <int NB, int D, int DW>
inline void add_chunk_lanes(Acc& acc, const Codes* c, const Tokens& t, const float* scales, const LaneScales& l) {
  acc.v = scaled(acc.v, dot<D, DW>(c, t), _mm512_permutexvar_ps(l.index, _mm512_loadu_ps(scales)));
}
// Each quad of codes has a scale: `index` says which.
template <int NB, int D, int DW>
inline void add_chunk_quads(Acc& acc, const Codes* c, const Tokens& t, const float* scales, const uint8_t* index, float step) {
  const __m512i own = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index));
  const __m512 scale = _mm512_permutexvar_ps(own, _mm512_loadu_ps(scales));
  acc.v = scaled(acc.v, dot<D, DW>(c, t), _mm512_mul_ps(scale, _mm512_set1_ps(step)));
}
// Sums over the lanes of four rows, of `a` and `start` each: rows become lanes while there are lanes to add up.
inline void acc_sums(const Acc (*a)[1], const __m512 (*start)[1], float (*out)[4]) {
  __m512 v[4], two[2];
  for (int r = 0; r < 4; ++r) v[r] = _mm512_add_ps(a[r][0].v, start[r][0]);
  for (int i = 0; i < 2; ++i)
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x44), _mm512_shuffle_ps(two[0], two[1], 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(out[0], _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

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
template <int PART = 0>
inline Floats f_codes(const uint8_t* p) {
  __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (PART == 1) v = _mm512_and_si512(v, _mm512_set1_epi32(15));
  if constexpr (PART == 2) v = _mm512_srli_epi32(v, 4);
  return _mm512_cvtepi32_ps(v);
}
// The first n of them (n < 16), zeros behind; nothing else is read.
inline Floats f_load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
template <int PART>
inline Floats f_codes_some(const uint8_t* p, int64_t n) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128((__m128i*)bytes, _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p));
  return f_codes<PART>(bytes);
}
// table[code] for 16 codes, all below `entries`.
inline Floats f_lookup(const uint8_t* codes, const float* table, int entries) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
  if (entries <= 16) return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps((__mmask16)((1u << entries) - 1), table));
  return _mm512_i32gather_ps(index, table, 4);
}
inline void f_to_codes(Floats v, uint8_t* p) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
inline void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
// Which of up to 16 levels a number belongs to: the number of thresholds below it, found in four comparisons.
class Search {
 public:
  explicit Search(const hqqtensor::Levels& l)
      : half_(_mm512_set1_ps(l.thresholds[7])),
        quarter_(_mm512_loadu_ps(l.thresholds + 3)),
        eighth_(_mm512_loadu_ps(l.thresholds + 1)),
        last_(_mm512_loadu_ps(l.thresholds)),
        values_(_mm512_loadu_ps(l.values)),
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
inline Floats f_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

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
  meet(8, 0xFF00, [](__m512i v) { return _mm512_shuffle_i32x4(v, v, 0x4E); });
  meet(4, 0xF0F0, [](__m512i v) { return _mm512_shuffle_i32x4(v, v, 0xB1); });
  meet(2, 0xCCCC, [](__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); });
  meet(1, 0xAAAA, [](__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); });
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
  if (shift == 8) {  // half a base more in all digits but the first: then each is a byte, less the same half
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
  const __m512i turn = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  if constexpr (COUNT == 3) {
    const __m512i half = _mm512_set1_epi32(0x8080);  // a digit with half a base more is a byte, less the same half
    __m512i v[4];
    for (int i = 0; i < 4; ++i)
      v[i] = _mm512_shuffle_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(number(i)), half), bytes);
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
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(turn, _mm512_shuffle_epi8(all, bytes)));
}
// Into the second level: aimed at the first, prefetches of a stream from memory wait for its few free slots (1.4 x slower).
// Not the intrinsic: GCC 12 takes a function that only prefetches for one without effects, and leaves out calls of it.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }

}  // namespace
