// AVX2 with FMA and F16C: a chunk of 64 codes is two vectors of bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "dispatch/kernels.h"

namespace {

constexpr int kRows = 2, kMaxTokens = 2;
constexpr int kFloats = 8;

struct Codes {
  __m256i a, b;  // codes 0..31 and 32..63
};
using Floats = __m256;
struct Acc {
  __m256 a, b;
};

// vpmaddubsw saturates at 2^15: 8-bit codes leave room for digits of 7 bits only.
constexpr int digit_shift(int nbits) { return nbits == 8 ? 7 : 8; }

template <int R>
inline __m256i shift_right(__m256i v) {
  if constexpr (R > 0) return _mm256_srli_epi32(v, R);
  if constexpr (R < 0) return _mm256_slli_epi32(v, -R);
  return v;
}

// Plane of P bits, quarter V of a block of 128 codes, its bits moved to bit L of each byte; the rest is noise.
template <int P, int L, int V>
inline __m256i plane(const uint8_t* b) {
  if constexpr (P == 8) {
    return _mm256_loadu_si256((const __m256i*)(b + 32 * V));
  } else if constexpr (P == 4) {
    return shift_right<4 * (V >> 1) - L>(_mm256_loadu_si256((const __m256i*)(b + 32 * (V & 1))));
  } else if constexpr (P == 2) {
    return shift_right<2 * V - L>(_mm256_loadu_si256((const __m256i*)b));
  } else {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)b));
    constexpr int r = 2 * V - L;  // L is even: both lanes shift the same way
    if constexpr (r >= 0) return _mm256_srlv_epi32(v, _mm256_set_epi32(r + 1, r + 1, r + 1, r + 1, r, r, r, r));
    constexpr int s = r < 0 ? -r : 1;
    return _mm256_sllv_epi32(v, _mm256_set_epi32(s - 1, s - 1, s - 1, s - 1, s, s, s, s));
  }
}

inline __m256i keep(int mask, __m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }

template <int NB, int V>
inline __m256i decode_quarter(const uint8_t* b) {
  if constexpr (NB == 1) return keep(1, plane<1, 0, V>(b));
  if constexpr (NB == 2) return keep(3, plane<2, 0, V>(b));
  if constexpr (NB == 3) return _mm256_or_si256(keep(3, plane<2, 0, V>(b)), keep(4, plane<1, 2, V>(b + 32)));
  if constexpr (NB == 4) return keep(15, plane<4, 0, V>(b));
  if constexpr (NB == 5) return _mm256_or_si256(keep(15, plane<4, 0, V>(b)), keep(16, plane<1, 4, V>(b + 64)));
  if constexpr (NB == 6) return _mm256_or_si256(keep(15, plane<4, 0, V>(b)), keep(48, plane<2, 4, V>(b + 64)));
  if constexpr (NB == 7)
    return _mm256_or_si256(
        _mm256_or_si256(keep(15, plane<4, 0, V>(b)), keep(48, plane<2, 4, V>(b + 64))),
        keep(64, plane<1, 6, V>(b + 96)));
  return plane<8, 0, V>(b);
}

template <int NB, int H>
inline Codes decode(const uint8_t* b) {
  return {decode_quarter<NB, 2 * H>(b), decode_quarter<NB, 2 * H + 1>(b)};
}
inline Codes load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_codes(uint8_t* p, Codes c) {
  _mm256_storeu_si256((__m256i*)p, c.a);
  _mm256_storeu_si256((__m256i*)(p + 32), c.b);
}

struct Tokens {
  const int8_t* p;  // 16 registers do not hold them: they are operands from memory
};
template <int D>
inline Tokens load_tokens(const int8_t* p) {
  return {p};
}

inline Codes lookup(const Codes& c, const uint8_t* table16) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table16));
  return {_mm256_shuffle_epi8(table, c.a), _mm256_shuffle_epi8(table, c.b)};
}

inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Sums of 4 products of 32 codes with 8-bit activations, as integers of 32 bits. MAX bounds a code, XMAX an activation:
// vpmaddubsw saturates at 2^15, so larger products are widened first.
template <int MAX, int XMAX>
inline __m256i dot_half(__m256i c, const int8_t* x) {
  const __m256i v = _mm256_load_si256((const __m256i*)x);
  if constexpr (2 * MAX * XMAX < 32768) return widen(_mm256_maddubs_epi16(c, v));
  const __m256i zero = _mm256_setzero_si256(), signs = _mm256_cmpgt_epi8(zero, v);
  const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi8(c, zero), _mm256_unpacklo_epi8(v, signs));
  const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi8(c, zero), _mm256_unpackhi_epi8(v, signs));
  // Lanes hold sums of 2: the pairs that follow one another belong together.
  return _mm256_hadd_epi32(low, high);
}

// The same for a whole chunk, both halves added: one widening for two where the sums of pairs still fit 16 bits.
template <int MAX, int XMAX>
inline __m256i dot_digit(const Codes& c, const int8_t* x) {
  if constexpr (4 * MAX * XMAX < 32768) {
    const __m256i a = _mm256_maddubs_epi16(c.a, _mm256_load_si256((const __m256i*)x));
    const __m256i b = _mm256_maddubs_epi16(c.b, _mm256_load_si256((const __m256i*)(x + 32)));
    return widen(_mm256_add_epi16(a, b));
  }
  return _mm256_add_epi32(dot_half<MAX, XMAX>(c.a, x), dot_half<MAX, XMAX>(c.b, x + 32));
}

template <int NB, int DW>
constexpr int max_code() {
  return DW == 0 ? (1 << NB) - 1 : DW == 1 ? 31 : 127;
}
template <int NB, int D, int DW>
constexpr int radix_shift() {
  return DW > 1 ? 7 : digit_shift(NB);
}

// One level of a product of D digits of activations with DW of codes (see avx512/vec.h): all pairs of digits whose
// places add up to it. `digit(code digit, activations)` multiplies one pair.
template <int D, int DW, class F>
inline __m256i level_sum(int level, const int8_t* x, F digit) {
  __m256i a = _mm256_setzero_si256();
  for (int d = 0; d < D; ++d)
    if (level - d >= 0 && level - d < (DW ? DW : 1)) a = _mm256_add_epi32(a, digit(level - d, x + 64 * d));
  return a;
}

template <int NB, int D, int DW>
inline void add_chunk(Acc& acc, const Codes* c, const Tokens& t, const float* scale) {
  constexpr int s = radix_shift<NB, D, DW>(), levels = D > DW ? D : DW;
  constexpr int MAX = max_code<NB, DW>(), XMAX = D == 1 ? 127 : 1 << (s - 1);
  const auto digit = [&](int i, const int8_t* x) { return dot_digit<MAX, XMAX>(c[i], x); };
  __m256i a = level_sum<D, DW>(0, t.p, digit);
  __m256 f;
  if constexpr (levels == 3) {  // a lane has 8 products here: the top digit goes on as a float, 32 bits hold the others
    const __m256i low =
        _mm256_add_epi32(_mm256_slli_epi32(level_sum<D, DW>(1, t.p, digit), s), level_sum<D, DW>(2, t.p, digit));
    f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps((float)(1 << (2 * s))), _mm256_cvtepi32_ps(low));
  } else {
    if constexpr (levels == 2) a = _mm256_add_epi32(_mm256_slli_epi32(a, s), level_sum<D, DW>(1, t.p, digit));
    f = _mm256_cvtepi32_ps(a);
  }
  acc.a = _mm256_fmadd_ps(f, _mm256_broadcast_ss(scale), acc.a);
}
struct LaneScales {
  __m256i index;
  int64_t half;  // scales in the first 32 codes
  explicit LaneScales(int64_t group_size) : half(32 / group_size) {
    alignas(32) int32_t lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = (int32_t)(4 * i / group_size);
    index = _mm256_load_si256((const __m256i*)lane);
  }
};
template <int NB, int D, int DW>
inline void add_halves(Acc& acc, const Codes* c, const Tokens& t, __m256 s0, __m256 s1) {
  constexpr int s = radix_shift<NB, D, DW>(), levels = D > DW ? D : DW;
  constexpr int MAX = max_code<NB, DW>(), XMAX = D == 1 ? 127 : 1 << (s - 1);
  const auto half = [&](auto part, const int8_t* x) {
    const auto digit = [&](int i, const int8_t* at) { return dot_half<MAX, XMAX>(part(c[i]), at); };
    __m256i a = level_sum<D, DW>(0, x, digit);
    for (int level = 1; level < levels; ++level)
      a = _mm256_add_epi32(_mm256_slli_epi32(a, s), level_sum<D, DW>(level, x, digit));
    return _mm256_cvtepi32_ps(a);
  };
  acc.a = _mm256_fmadd_ps(half([](const Codes& v) { return v.a; }, t.p), s0, acc.a);
  acc.b = _mm256_fmadd_ps(half([](const Codes& v) { return v.b; }, t.p + 32), s1, acc.b);
}
template <int NB, int D, int DW>
inline void add_chunk_lanes(Acc& acc, const Codes* c, const Tokens& t, const float* scales, const LaneScales& l) {
  add_halves<NB, D, DW>(acc, c, t, _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), l.index),
                        _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales + l.half), l.index));
}
// Each quad of codes has a scale: `index` says which.
template <int NB, int D, int DW>
inline void add_chunk_quads(Acc& acc, const Codes* c, const Tokens& t, const float* scales, const uint8_t* index, float step) {
  const __m256 s = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(step));
  const auto own = [&](int i) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(index + 8 * i))); };
  add_halves<NB, D, DW>(acc, c, t, _mm256_permutevar8x32_ps(s, own(0)), _mm256_permutevar8x32_ps(s, own(1)));
}

template <int NB>
struct Pairs {  // see avx512/pairs.h
  static constexpr bool serve = false;
};
template <int NB>
struct Wide {  // see avx512/wide.h
  static constexpr bool serve = false;
};
inline void pair_digits(int8_t*, int8_t*) {}

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
inline float acc_sum(const Acc& a, __m256 more) { return f_sum(_mm256_add_ps(_mm256_add_ps(a.a, a.b), more)); }
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
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i b = _mm256_shuffle_epi8(v, pick);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
}
inline void f_to_codes(Floats v, uint8_t* p) { _mm_storel_epi64((__m128i*)p, to_bytes(_mm256_cvtps_epi32(v))); }
// Which of up to 16 levels a number belongs to: the number of thresholds below it, found in four comparisons.
class Search {
 public:
  explicit Search(const hqqtensor::Levels& l)
      : half_(_mm256_set1_ps(l.thresholds[7])), codes_(_mm_loadu_si128((const __m128i*)l.codes)) {
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
inline void f_store_f16(uint16_t* p, Floats v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats f_load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
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
// See avx512/vec.h for both.
inline void f_largest_each(const float* p, int64_t count, float* top) {
  for (int64_t c = 0; c < 16; ++c) top[c] = c < count ? f_largest(p + 64 * c, 64) : 0;
}
template <int COUNT>
inline void f_store_chunk(int8_t* out, const float* in, float scale) {
  for (int i = 0; i < 64; i += kFloats) f_store_digits(out + i, f_mul(f_load(in + i), f_set(scale)), 8, COUNT, 64, 4);
}
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }  // see avx512/vec.h

}  // namespace
