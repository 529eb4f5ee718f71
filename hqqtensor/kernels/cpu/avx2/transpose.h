// AVX2: transposes that make rows of the weight lanes, so that products of many tokens with a panel of rows need no sums across
// lanes. A vector has 8 rows, each with one float or with 4 neighbouring codes (a quad).
//
//   one vector of codes, 32 bytes: quad q of rows 8 v .. 8 v + 7       WIDE: as integers of 16 bits, in two vectors
//     byte        0   1    2    3     4  ..  7   ...   28 .. 31          first   rows 8 v + 0, 1, 4, 5
//     row               8 v            8 v + 1   ...    8 v + 7          second  rows 8 v + 2, 3, 6, 7
//     column  4 q   +1   +2   +3
#pragma once
#include <utility>

#include "avx2/target.h"
#include "generic/panel.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPairRows = 16;  // what a tile takes: two vectors
constexpr int64_t kPanelPairs = kPanelRows / kPairRows;

// 16 bytes of each of 8 rows: out[i] holds bytes 4 i .. 4 i + 3 of row l in lane l.
inline __attribute__((always_inline)) void transpose16(const uint8_t* const* rows, int64_t offset, __m256i* out) {
  const auto two = [&](int r) __attribute__((always_inline)) {
    const __m128i low = _mm_loadu_si128((const __m128i*)(rows[r] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i*)(rows[r + 4] + offset)), 1);
  };
  const __m256i a0 = two(0), a1 = two(1), a2 = two(2), a3 = two(3);
  const __m256i b0 = _mm256_unpacklo_epi32(a0, a1), b1 = _mm256_unpackhi_epi32(a0, a1);
  const __m256i b2 = _mm256_unpacklo_epi32(a2, a3), b3 = _mm256_unpackhi_epi32(a2, a3);
  out[0] = _mm256_unpacklo_epi64(b0, b2);
  out[1] = _mm256_unpackhi_epi64(b0, b2);
  out[2] = _mm256_unpacklo_epi64(b1, b3);
  out[3] = _mm256_unpackhi_epi64(b1, b3);
}

// Quad J of a block into a panel: as bytes in every other vector, or WIDE as 16-bit integers in two vectors (rows 0, 1, 4, 5
// and rows 2, 3, 6, 7).
template <bool WIDE>
inline __attribute__((always_inline)) void put_quad(__m256i codes, __m256i* to) {
  if constexpr (WIDE) {
    to[0] = _mm256_unpacklo_epi8(codes, _mm256_setzero_si256());
    to[1] = _mm256_unpackhi_epi8(codes, _mm256_setzero_si256());
  } else {
    to[0] = codes;
  }
}

// The block of 128 codes at `offset` of 8 rows into 32 quads of a panel, two vectors apart.
template <int NB, bool WIDE>
inline void transpose_block(const uint8_t* const* from, int64_t offset, __m256i* panel) {
  const uint8_t* const rows[] = {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
  if constexpr ((NB & (NB - 1)) == 0) {  // one plane: 16 bytes at a time, which registers hold
    for (int i = 0; i < NB; ++i) {
      __m256i t[4];
      transpose16(rows, offset + 16 * i, t);
      [&]<int... U>(std::integer_sequence<int, U...>) __attribute__((always_inline)) {
        (put_quad<WIDE>(NB == 8 ? t[U % 4] : keep((1 << NB) - 1, shift_right<U / 4 * NB>(t[U % 4])),
                        panel + 2 * (4 * i + U % 4 + U / 4 * 4 * NB)),
         ...);
      }(std::make_integer_sequence<int, 32 / NB>());
    }
  } else {
    __m256i t[4 * NB];
    for (int i = 0; i < NB; ++i) transpose16(rows, offset + 16 * i, t + 4 * i);
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      (put_quad<WIDE>(transposed_codes<NB, J>(t), panel + 2 * J), ...);
    }(std::make_integer_sequence<int, 32>());
  }
}

// Codes of columns [k, k + depth), k a multiple of 128, of some pairs: as bytes [pair][quads][2][8 rows][4], or WIDE
// [2 pair + vector][quads][2].
template <bool WIDE>
void transpose_codes(const Weight& w, const uint8_t* const* rows, int64_t pairs, int64_t k, int64_t depth, int64_t quads,
                     __m256i* panel) {
  with_nbits(w.nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    for (int64_t b = 0; b < depth; b += 128)
      for (int64_t v = 0; v < 2 * pairs; ++v) {
        const int64_t offset = (k + b) / 8 * NB;
        __m256i* to = panel + (WIDE ? 2 * (v * quads + b / 4) : 2 * (v / 2 * quads + b / 4) + v % 2);
        if (k + b + 128 <= w.K) {
          transpose_block<NB, WIDE>(rows + 8 * v, offset, to);
          continue;
        }
        const UnpackedRows<8> tail(rows + 8 * v, offset, NB, w.K - k - b);
        transpose_block<8, WIDE>(tail.rows, 0, to);
      }
  });
}

// in[8][8] with rows in_stride apart to out[i][l] = in[l][i], rows of kPanelRows.
inline void transpose_floats(const float* in, int64_t in_stride, float* out) {
  const uint8_t* rows[8];
  __m256i t[4];
  for (int r = 0; r < 8; ++r) rows[r] = (const uint8_t*)(in + r * in_stride);
  for (int q = 0; q < 2; ++q) {
    transpose16(rows, 16 * q, t);
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256((__m256i*)(out + (4 * q + i) * kPanelRows), t[i]);
  }
}

// Keeps a value where it is: else gcc 12 moves accumulators about, and to memory, at every step of a loop.
inline __attribute__((always_inline)) void keep_in_register(__m256i& v) { asm("" : "+x"(v)); }
inline __attribute__((always_inline)) void keep_in_register(__m256& v) { asm("" : "+x"(v)); }

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
