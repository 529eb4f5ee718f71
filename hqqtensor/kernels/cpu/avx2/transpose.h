// AVX2: rows turned into lanes. 8 rows fill a vector, each with 4 codes (bytes) that follow one another or one float,
// so that products of many tokens with a panel of rows need no sums across lanes.
#pragma once
#include <utility>

#include "avx2/target.h"
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPairRows = 16;                                         // what a tile takes: two vectors
constexpr int64_t kPanelPairs = 2, kPanelRows = kPairRows * kPanelPairs;  // of a panel

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

// Codes 4 J .. 4 J + 3 of each row out of the turned plane of P bits at t, moved to bit LOW of each byte, other bits zero.
template <int P, int LOW, int J>
inline __attribute__((always_inline)) __m256i transposed_plane(const __m256i* t) {
  return keep(((1 << P) - 1) << LOW, shift_right<(J / (4 * P)) * P - LOW>(t[J % (4 * P)]));
}

// The same out of all planes of a block of 128, which follow one another.
template <int NB, int J>
inline __attribute__((always_inline)) __m256i transposed_codes(const __m256i* t) {
  __m256i v = _mm256_setzero_si256();
  if constexpr ((NB & 4) != 0) v = transposed_plane<4, 0, J>(t);
  if constexpr ((NB & 2) != 0) v = _mm256_or_si256(v, transposed_plane<2, NB & 4, J>(t + 4 * (NB & 4)));
  if constexpr ((NB & 1) != 0) v = _mm256_or_si256(v, transposed_plane<1, NB & 6, J>(t + 4 * (NB & 6)));
  return v;
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
        uint8_t codes[8][128];
        const uint8_t* unpacked[8];
        for (int r = 0; r < 8; ++r) {
          unpack_tail(rows[8 * v + r] + offset, NB, (w.K - k - b + 7) / 8 * 8, codes[r]);
          unpacked[r] = codes[r];
        }
        transpose_block<8, WIDE>(unpacked, 0, to);
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

// Scales times `unit` and minus scale times zero point (or `offset`) of the rows of an axis-1 weight: [groups][kPanelRows]
// each. lines: room for 2 x 8 rows of groups.
void transpose_scales(const Weight& w, const int64_t* rows, int64_t pairs, float unit, float offset, float* lines, float* scale,
                      float* shift) {
  const int64_t width = padded(w.groups);
  float *s = lines, *z = lines + 8 * width;
  for (int64_t v = 0; v < 2 * pairs; ++v) {
    for (int64_t r = 0; r < 8; ++r) {
      float *sr = s + r * width, *zr = z + r * width;
      load_values(w.scale, rows[8 * v + r], 0, w.groups, sr);
      if (w.zero.data) load_values(w.zero, rows[8 * v + r], 0, w.groups, zr);
      for (int64_t g = 0; g < w.groups; g += kFloats) {
        const Floats value = f_load(sr + g);
        f_store(zr + g, f_mul(f_sub(f_zero(), value), w.zero.data ? f_load(zr + g) : f_set(offset)));
        f_store(sr + g, f_mul(value, f_set(unit)));
      }
    }
    for (int64_t g = 0; g < w.groups; g += 8) {
      transpose_floats(s + g, width, scale + g * kPanelRows + 8 * v);
      transpose_floats(z + g, width, shift + g * kPanelRows + 8 * v);
    }
  }
}

// Lines of packed codes that will be turned next, fetched a few at a time while products keep the processor busy.
struct Prefetcher {
  const uint8_t* const* rows;
  int64_t count;   // rows
  int64_t offset;  // of the next line in each row
  int64_t bytes;   // still to fetch of each row
  int64_t row = 0;

  void run(int64_t lines) {
    for (; lines > 0 && bytes > 0; --lines) {
      prefetch(rows[row] + offset);
      if (++row == count) row = 0, offset += 64, bytes -= 64;
    }
  }
  int64_t lines() const { return (bytes + 63) / 64 * count; }
};

// Results of the rows of a panel for all tokens, plus bias.
void store_panel(const Problem& p, float* sums, const int64_t* index, int64_t count) {
  const int64_t size = size_of(p.x_type);
  const bool together = index[count - 1] == index[0] + count - 1;
  for (int64_t m = 0; m < p.M; ++m, sums += kPanelRows) {
    if (p.bias)
      for (int64_t r = 0; r < count; ++r) sums[r] += p.bias[index[r]];
    char* y = (char*)p.y + m * p.y_stride * size;
    if (together)
      from_float(sums, count, p.x_type, y + index[0] * size);
    else
      for (int64_t r = 0; r < count; ++r) from_float(sums + r, 1, p.x_type, y + index[r] * size);
  }
}

// Keeps a value where it is: else gcc 12 moves accumulators about, and to memory, at every step of a loop.
inline __attribute__((always_inline)) void keep_in_register(__m256i& v) { asm("" : "+x"(v)); }
inline __attribute__((always_inline)) void keep_in_register(__m256& v) { asm("" : "+x"(v)); }

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
