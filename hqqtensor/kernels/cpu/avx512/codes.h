// AVX-512 with VNNI: chunks of 64 codes, one vector of bytes, and their products with activations.
#pragma once
#include "avx512/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kGemvRows = 4, kGemvTokens = 1;            // tile of linear_rows: rows of the weight x rows of the activations
constexpr int kDenseTileRows = 6, kDenseTileTokens = 4;  // tile of linear_dense

using Codes = __m512i;
struct Acc {
  __m512 v;
};

constexpr int digit_shift(int) { return 8; }

// The bits of `mask` in each byte.
inline __m512i keep(int mask, __m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }
// Lanes of 32 bits shifted to the right by R, to the left where R is negative.
template <int R>
inline __m512i shift_right(__m512i v) {
  if constexpr (R > 0) return _mm512_srli_epi32(v, R);
  if constexpr (R < 0) return _mm512_slli_epi32(v, -R);
  return v;
}

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

// Two lanes of each.
inline __m512i eighths(int a, int b, int c, int d, int e, int f, int g, int h) {
  return _mm512_set_epi32(h, h, g, g, f, f, e, e, d, d, c, c, b, b, a, a);
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
  if constexpr (NB == 7) v = select(15, plane<4, 0, H>(b), select(48, plane<2, 4, H>(b + 64), plane<1, 6, H>(b + 96)));
  return keep((1 << NB) - 1, v);
}

// The same for a row's last block where it has 64 codes: planes of 8 P bytes.
template <int P, int L>
inline __m512i half_plane(const uint8_t* b) {
  if constexpr (P == 8) return _mm512_loadu_si512(b);
  constexpr auto turn = [](int bit) { return (bit - L) & 31; };
  if constexpr (P == 4) {
    const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)b));
    return _mm512_rorv_epi32(v, eighths(turn(0), turn(0), turn(0), turn(0), turn(4), turn(4), turn(4), turn(4)));
  } else if constexpr (P == 2) {
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)b));
    return _mm512_rorv_epi32(v, eighths(turn(0), turn(0), turn(2), turn(2), turn(4), turn(4), turn(6), turn(6)));
  } else {
    int64_t bits;
    __builtin_memcpy(&bits, b, 8);
    const __m512i turns = eighths(turn(0), turn(1), turn(2), turn(3), turn(4), turn(5), turn(6), turn(7));
    return _mm512_rorv_epi32(_mm512_set1_epi64(bits), turns);
  }
}
#define HQQTENSOR_HAS_HALF_BLOCK
template <int NB>
inline Codes decode_half(const uint8_t* b) {
  __m512i v;
  if constexpr (NB == 1) v = half_plane<1, 0>(b);
  if constexpr (NB == 2) v = half_plane<2, 0>(b);
  if constexpr (NB == 3) v = select(3, half_plane<2, 0>(b), half_plane<1, 2>(b + 16));
  if constexpr (NB == 4) v = half_plane<4, 0>(b);
  if constexpr (NB == 5) v = select(15, half_plane<4, 0>(b), half_plane<1, 4>(b + 32));
  if constexpr (NB == 6) v = select(15, half_plane<4, 0>(b), half_plane<2, 4>(b + 32));
  if constexpr (NB == 7) v = select(15, half_plane<4, 0>(b), select(48, half_plane<2, 4>(b + 32), half_plane<1, 6>(b + 48)));
  if constexpr (NB == 8) v = half_plane<8, 0>(b);
  return NB == 8 ? v : keep((1 << NB) - 1, v);
}

inline Codes load_codes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

struct ChunkDigits {  // the digits of one chunk of activations
  __m512i d[3];
};
template <int D>
inline ChunkDigits load_chunk_digits(const int8_t* p) {
  ChunkDigits t;
  for (int d = 0; d < D; ++d) t.d[d] = _mm512_load_si512(p + 64 * d);
  return t;
}

inline Codes lookup(Codes c, const uint8_t* table16) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table16)), c);
}

// sum over the 4 codes of each lane of code * activation, as one integer; exact (see digit_limit). DW > 1: codes of DW
// digits of 7 bits; what falls below the last digit kept is left out.
template <int D, int DW>
inline __m512i dot(const Codes* c, const ChunkDigits& t) {
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
inline void add_chunk(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scale) {
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
inline void add_chunk_lanes(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const LaneScales& l) {
  acc.v = scaled(acc.v, dot<D, DW>(c, t), _mm512_permutexvar_ps(l.index, _mm512_loadu_ps(scales)));
}
// Each quad of codes has a scale: `index` says which.
template <int NB, int D, int DW>
inline void add_chunk_quads(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const uint8_t* index,
                            float step) {
  const __m512i which = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index));
  const __m512 scale = _mm512_permutexvar_ps(which, _mm512_loadu_ps(scales));
  acc.v = scaled(acc.v, dot<D, DW>(c, t), _mm512_mul_ps(scale, _mm512_set1_ps(step)));
}
#define HQQTENSOR_HAS_ACC_SUMS
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

inline void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
