// What the panels of AVX-512 and AMX share: transposes of dwords, and sums of several levels as floats.
//
//   a transpose of 16 rows: dword i of row l becomes lane l of vector i
//     row 0   a0 a1 a2 ...          vector 0   a0 b0 c0 ...
//     row 1   b0 b1 b2 ...    ->    vector 1   a1 b1 c1 ...
//     row 2   c0 c1 c2 ...          vector 2   a2 b2 c2 ...
#pragma once
#include "avx512/target.h"
#include "generic/panel.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// 16 bytes of each of 16 rows: out[i] holds bytes 4 i .. 4 i + 3 of row l in lane l.
inline __attribute__((always_inline)) void transpose16(const uint8_t* const* rows, int64_t offset, __m512i* out) {
  const auto load = [&](int r) __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(rows[r] + offset)); };
  const auto four = [&](int i) __attribute__((always_inline)) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i + 8)), load(i + 12), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  };
  const __m512i a0 = four(0), a1 = four(1), a2 = four(2), a3 = four(3);
  const __m512i b0 = _mm512_unpacklo_epi32(a0, a1), b1 = _mm512_unpackhi_epi32(a0, a1);
  const __m512i b2 = _mm512_unpacklo_epi32(a2, a3), b3 = _mm512_unpackhi_epi32(a2, a3);
  out[0] = _mm512_unpacklo_epi64(b0, b2);
  out[1] = _mm512_unpackhi_epi64(b0, b2);
  out[2] = _mm512_unpacklo_epi64(b1, b3);
  out[3] = _mm512_unpackhi_epi64(b1, b3);
}

// in[16][16] with rows in_stride apart to out[i][l] = in[l][i], rows of kPanelRows.
inline void transpose_floats(const float* in, int64_t in_stride, float* out) {
  const uint8_t* rows[16];
  __m512i t[4];
  for (int r = 0; r < 16; ++r) rows[r] = (const uint8_t*)(in + r * in_stride);
  for (int q = 0; q < 4; ++q) {
    transpose16(rows, 16 * q, t);
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + (4 * q + i) * kPanelRows, t[i]);
  }
}

// 16 x 16 dwords in registers: dword i of r[l] becomes lane l of r[i].
inline void transpose16x16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
      r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
    }
  // r[4 q + c]: columns c, c + 4, c + 8, c + 12 of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// Sums of L levels as floats: level(0) counts most, each of the next 2^SHIFT times less.
template <int L, int SHIFT, class Level>
inline __attribute__((always_inline)) __m512 combine_levels(Level level) {
  __m512i low = level(L - 1);
  if constexpr (L > 1) low = _mm512_add_epi32(low, _mm512_slli_epi32(level(L - 2), SHIFT));
  if constexpr (L < 3) return _mm512_cvtepi32_ps(low);
  // 32 bits do not hold the top digits of a whole group as well.
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(level(0)), _mm512_set1_ps((float)(1 << (2 * SHIFT))), _mm512_cvtepi32_ps(low));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
