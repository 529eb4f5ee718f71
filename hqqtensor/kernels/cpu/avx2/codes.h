// AVX2: chunks of 64 codes, two vectors of bytes, and their products with activations.
#pragma once
#include "avx2/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kGemvRows = 2, kGemvTokens = 2;

struct Codes {
  __m256i a, b;  // codes 0..31 and 32..63
};
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
    return _mm256_or_si256(_mm256_or_si256(keep(15, plane<4, 0, V>(b)), keep(48, plane<2, 4, V>(b + 64))),
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

struct ChunkDigits {
  const int8_t* p;  // 16 registers do not hold them: they are operands from memory
};
template <int D>
inline ChunkDigits load_chunk_digits(const int8_t* p) {
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

// Sums of 2 products of both halves of a chunk, added: integers of 16 bits.
inline __m256i dot_pairs(const Codes& c, const int8_t* x) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(c.a, _mm256_load_si256((const __m256i*)x)),
                          _mm256_maddubs_epi16(c.b, _mm256_load_si256((const __m256i*)(x + 32))));
}

// The same for a whole chunk, both halves added: one widening for two where the sums of pairs still fit 16 bits.
template <int MAX, int XMAX>
inline __m256i dot_digit(const Codes& c, const int8_t* x) {
  if constexpr (4 * MAX * XMAX < 32768) return widen(dot_pairs(c, x));
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

// Codes of 8 bits with activations of two digits meet as integers of 16 bits, for which activations are stored as such:
// [2 halves of the chunk][2][16], in the order of vpunpcklbw and vpunpckhbw.
template <int NB, int D, int DW>
constexpr bool as_int16 = NB == 8 && D == 2 && DW == 0;

template <bool HIGH>
inline __m256i digits_int16(__m256i upper, __m256i lower) {
  const __m256i zero = _mm256_setzero_si256();  // below a digit, which so counts 256-fold
  const __m256i up = HIGH ? _mm256_unpackhi_epi8(zero, upper) : _mm256_unpacklo_epi8(zero, upper);
  const __m256i low = HIGH ? _mm256_unpackhi_epi8(zero, lower) : _mm256_unpacklo_epi8(zero, lower);
  return _mm256_add_epi16(_mm256_srai_epi16(up, 8 - digit_shift(8)), _mm256_srai_epi16(low, 8));
}
inline void store_int16(int8_t* digits) {
  const Codes upper = load_codes((const uint8_t*)digits), lower = load_codes((const uint8_t*)digits + 64);
  __m256i* out = (__m256i*)digits;
  _mm256_store_si256(out, digits_int16<false>(upper.a, lower.a));
  _mm256_store_si256(out + 1, digits_int16<true>(upper.a, lower.a));
  _mm256_store_si256(out + 2, digits_int16<false>(upper.b, lower.b));
  _mm256_store_si256(out + 3, digits_int16<true>(upper.b, lower.b));
}

// Sums of products of a chunk, eight of them in each lane: of quads at the same place in both halves where QUADS.
template <int NB, int D, int DW, bool QUADS>
inline __m256 chunk_sum(const Codes* c, const ChunkDigits& t) {
  if constexpr (as_int16<NB, D, DW>) {
    const __m256i zero = _mm256_setzero_si256(), *x = (const __m256i*)t.p;
    const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpacklo_epi8(c[0].a, zero), x[0]),
                                         _mm256_madd_epi16(_mm256_unpacklo_epi8(c[0].b, zero), x[2]));
    const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpackhi_epi8(c[0].a, zero), x[1]),
                                          _mm256_madd_epi16(_mm256_unpackhi_epi8(c[0].b, zero), x[3]));
    return _mm256_cvtepi32_ps(QUADS ? _mm256_hadd_epi32(low, high) : _mm256_add_epi32(low, high));
  }
  constexpr int s = radix_shift<NB, D, DW>(), levels = D > DW ? D : DW;
  constexpr int MAX = max_code<NB, DW>(), XMAX = D == 1 ? 127 : 1 << (s - 1);
  if constexpr (levels == 2 && D == 2 && DW == 0 && 4 * MAX * XMAX < 32768)  // the widening multiplies the upper digit
    return _mm256_cvtepi32_ps(
        _mm256_add_epi32(_mm256_madd_epi16(dot_pairs(c[0], t.p), _mm256_set1_epi16(1 << s)), widen(dot_pairs(c[0], t.p + 64))));
  const auto digit = [&](int i, const int8_t* x) { return dot_digit<MAX, XMAX>(c[i], x); };
  __m256i a = level_sum<D, DW>(0, t.p, digit);
  if constexpr (levels == 3) {  // the top digit goes on as a float, 32 bits hold the others
    const __m256i low =
        _mm256_add_epi32(_mm256_slli_epi32(level_sum<D, DW>(1, t.p, digit), s), level_sum<D, DW>(2, t.p, digit));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps((float)(1 << (2 * s))), _mm256_cvtepi32_ps(low));
  }
  if constexpr (levels == 2) a = _mm256_add_epi32(_mm256_slli_epi32(a, s), level_sum<D, DW>(1, t.p, digit));
  return _mm256_cvtepi32_ps(a);
}

template <int NB, int D, int DW>
inline void add_chunk(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scale) {
  acc.a = _mm256_fmadd_ps(chunk_sum<NB, D, DW, false>(c, t), _mm256_broadcast_ss(scale), acc.a);
}

// Groups of 8 to 32 codes. Quads of both halves of a chunk alternate, first those of even places in the first half and of odd
// ones in the second, then the others with neighbours swapped:
//   vector a:  0  9  2 11  4 13  6 15        vector b:  1  8  3 10  5 12  7 14
// so that the quads in a lane belong to one group, and a sum over both vectors takes one conversion and one multiplication.
inline Codes lane_order(const Codes& c) {
  return {_mm256_blend_epi32(c.a, c.b, 0xAA), _mm256_shuffle_epi32(_mm256_blend_epi32(c.b, c.a, 0xAA), 0xB1)};
}

#define HQQTENSOR_HAS_DIGIT_ORDER
inline void order_digits(int nbits, int count, bool lanes, int8_t* chunk) {
  for (int i = 0; i < count && lanes; ++i)
    store_codes((uint8_t*)chunk + 64 * i, lane_order(load_codes((const uint8_t*)chunk + 64 * i)));
  if (nbits == 8 && count == 2) store_int16(chunk);
}
struct LaneScales {
  __m256i index;
  explicit LaneScales(int64_t group_size) {
    alignas(32) int32_t lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = (int32_t)((i % 2 * 32 + 4 * i) / group_size);
    index = _mm256_load_si256((const __m256i*)lane);
  }
};
template <int NB, int D, int DW>
inline void add_chunk_lanes(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const LaneScales& l) {
  Codes ordered[DW ? DW : 1];
  for (int i = 0; i < (DW ? DW : 1); ++i) ordered[i] = lane_order(c[i]);
  const __m256 by = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), l.index);
  acc.a = _mm256_fmadd_ps(chunk_sum<NB, D, DW, true>(ordered, t), by, acc.a);
}

template <int NB, int D, int DW>
inline void add_halves(Acc& acc, const Codes* c, const ChunkDigits& t, __m256 s0, __m256 s1) {
  constexpr int s = radix_shift<NB, D, DW>(), levels = D > DW ? D : DW;
  constexpr int MAX = max_code<NB, DW>(), XMAX = D == 1 ? 127 : 1 << (s - 1);
  const auto half = [&](auto part, const int8_t* x) {
    const auto digit = [&](int i, const int8_t* at) { return dot_half<MAX, XMAX>(part(c[i]), at); };
    __m256i a = level_sum<D, DW>(0, x, digit);
    for (int level = 1; level < levels; ++level)
      a = _mm256_add_epi32(_mm256_slli_epi32(a, s), level_sum<D, DW>(level, x, digit));
    return _mm256_cvtepi32_ps(a);
  };
  acc.a = _mm256_fmadd_ps(half([&](const Codes& v) { return v.a; }, t.p), s0, acc.a);
  acc.b = _mm256_fmadd_ps(half([&](const Codes& v) { return v.b; }, t.p + 32), s1, acc.b);
}
// Each quad of codes has a scale: `index` says which.
template <int NB, int D, int DW>
inline void add_chunk_quads(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const uint8_t* index,
                            float step) {
  const __m256 s = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(step));
  const auto scales_of = [&](int i) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(index + 8 * i))); };
  add_halves<NB, D, DW>(acc, c, t, _mm256_permutevar8x32_ps(s, scales_of(0)), _mm256_permutevar8x32_ps(s, scales_of(1)));
}

inline float acc_sum(const Acc& a, __m256 more) { return f_sum(_mm256_add_ps(_mm256_add_ps(a.a, a.b), more)); }

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
