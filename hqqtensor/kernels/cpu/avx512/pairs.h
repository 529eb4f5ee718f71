// Blocks of 128 codes of up to 4 bits multiplied whole, where avx512/wide.h does not serve (tables, groups of less than 64):
// one conversion and one multiplication by the scales for both halves, whose groups may differ, instead of one for each.
//
// A byte holds codes of both halves (4 bits: code i below code i + 64). Of even dwords the first half's codes are taken,
// of odd ones the second half's, by one mask; with the dwords of each pair swapped the same mask takes those left over. So
// even lanes of a sum belong to the first half and odd lanes to the second, and take their scales as pairs. Codes stay
// where they are in their byte (shifts cost as much as products): the second half's count 16-fold, which its scales make
// up for, and planes of fewer bits more in some lanes, which are divided at the end of a row. Where 24-bit activations
// leave no room for that, or codes are looked up, they are shifted down first. Activations are put in the same order once.
//
// Zen 4 multiplies, and also rotates, shuffles by 3 operands and selects, in one pair of its pipes, and shifts and converts
// in the other: a block of 4 bits and 16-bit activations costs it 5 cycles.
#pragma once
#include "avx512/codes.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

#define HQQTENSOR_HAS_PAIRS
inline __m512i quarters(int a, int b, int c, int d) { return _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a); }
inline __m512i by_halves(int even, int odd) {  // even lanes are of the first half of a block, odd ones of the second
  return _mm512_set_epi32(odd, even, odd, even, odd, even, odd, even, odd, even, odd, even, odd, even, odd, even);
}

template <int NB>
struct Pairs {
  static constexpr bool serve = NB <= 4;
  using Sums = __m512i;

  // Where the first half's code lies in the bytes of each lane; the second half's 4 bits above.
  static __m512i places() {
    if constexpr (NB == 1) return quarters(0, 1, 2, 3);
    if constexpr (NB == 2) return quarters(0, 0, 2, 2);
    if constexpr (NB == 3) return quarters(0, 0, 1, 1);
    return _mm512_setzero_si512();
  }
  // What a lane's sum of codes left in place is to be multiplied with besides its scale.
  static __m512 lane_factors() {
    const __m512i p = places();
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), p), 23));  // 2^-p
  }

  static __m512i bytes(const uint8_t* b) {
    if constexpr (NB == 4) return _mm512_loadu_si512(b);
    const auto two = [&] { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)b)); };
    const auto one = [&](int64_t o) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(b + o))); };
    if constexpr (NB == 1) return one(0);
    if constexpr (NB == 2) return two();
    // 2 + 1: moved next to each other, in a nibble for each half.
    const __m512i low = _mm512_srlv_epi32(two(), quarters(0, 0, 1, 1));
    const __m512i high = _mm512_sllv_epi32(one(32), quarters(2, 1, 1, 0));
    return _mm512_ternarylogic_epi32(quarters(0x33333333, 0x33333333, 0x66666666, 0x66666666), low, high, 0xCA);
  }

  template <bool IN_PLACE>
  static void decode(const uint8_t* b, Codes& first, Codes& second) {
    first = bytes(b);
    second = _mm512_shuffle_epi32(first, _MM_PERM_CDAB);
    if constexpr (IN_PLACE) {
      constexpr int m = ((1 << NB) - 1) * 0x01010101, high = (int)((unsigned)m << 4);
      const __m512i mask = _mm512_sllv_epi32(by_halves(m, high), places());
      first = _mm512_and_si512(first, mask);
      second = _mm512_and_si512(second, mask);
    } else {
      const __m512i down = _mm512_add_epi32(by_halves(0, 4), places()), mask = _mm512_set1_epi8((1 << NB) - 1);
      first = _mm512_and_si512(_mm512_srlv_epi32(first, down), mask);
      second = _mm512_and_si512(_mm512_srlv_epi32(second, down), mask);
    }
  }

  // Sums of the products of a block, see `dot`.
  template <int D, int DW>
  static __m512i dot(const Codes* c, const ChunkDigits* t) {
    constexpr int W = DW ? DW : 1;
    __m512i a = _mm512_setzero_si512();
    for (int level = 0; level < (D > W ? D : W); ++level) {
      if (level) a = _mm512_slli_epi32(a, DW > 1 ? 7 : 8);
      for (int d = 0; d < D; ++d)
        if (level - d >= 0 && level - d < W)
          for (int v = 0; v < 2; ++v) a = _mm512_dpbusd_epi32(a, c[v * W + level - d], t[v].d[d]);
    }
    return a;
  }

  // Each half has a scale, or several.
  static void add(Acc& acc, __m512i sum, const float* scale) {
    double both;
    __builtin_memcpy(&both, scale, sizeof both);
    acc.v = scaled(acc.v, sum, _mm512_castpd_ps(_mm512_set1_pd(both)));
  }
  static void add_lanes(Acc& acc, __m512i sum, const float* scale, const LaneScales& l) {
    acc.v = scaled(acc.v, sum, _mm512_permutexvar_ps(l.pair, _mm512_loadu_ps(scale)));
  }
  // Each quad of codes has one: `index` says which. Their sums get the steps of both halves.
  template <int D, int DW>
  static void add_quads(Acc& acc, const Codes* c, const ChunkDigits* t, const float* scale, const uint8_t* index,
                        const float* step) {
    constexpr int W = DW ? DW : 1;
    const __m512 scales = _mm512_loadu_ps(scale);
    const auto scales_of = [&](int i) {
      return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(index + 16 * i))), scales);
    };
    double both;
    __builtin_memcpy(&both, step, sizeof both);
    const __m512 first = _mm512_mul_ps(_mm512_cvtepi32_ps(hqqtensor::dot<D, DW>(c, t[0])), scales_of(0));
    acc.v = _mm512_fmadd_ps(scaled(first, hqqtensor::dot<D, DW>(c + W, t[1]), scales_of(1)),
                            _mm512_castpd_ps(_mm512_set1_pd(both)), acc.v);
  }
  static void finish(Acc& acc) { acc.v = _mm512_mul_ps(acc.v, lane_factors()); }
};

// One digit of 128 activations in the order of `Pairs`.
inline void pair_digits(int8_t* low, int8_t* high) {
  const __m512i a = _mm512_load_si512(low), b = _mm512_load_si512(high);
  _mm512_store_si512(low, _mm512_mask_blend_epi32(0xAAAA, a, b));
  _mm512_store_si512(high, _mm512_shuffle_epi32(_mm512_mask_blend_epi32(0xAAAA, b, a), _MM_PERM_CDAB));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
