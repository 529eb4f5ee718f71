// Groups of 20 codes of 4 bits, the recommended ones, 16 groups at a time: a span of 320 codes. Lane l of every vector belongs
// to group l, and vector v has its quad v (4 neighbouring codes), so that the products of a group meet in its lane: one
// conversion and one multiplication by 16 scales serve the span.
//
//   codes of a row, by quads      0 1 2 3 4 | 5 6 7 8 9 | 10 11 12 13 14 | ...      groups of 5 quads
//   vector 0                      0           5           10               ...      16 lanes
//   vector 1                        1           6            11            ...
//   ...
//   vector 4                                4           9                14
//
// A dword of a packed block of 128 codes holds quad j in the low halves of its bytes and quad j + 16 in the high ones. A span
// begins at the low or at the high halves of a block in turn and takes dwords of three blocks, 48 at most: a permutation of
// the first two vectors, one of the third, and a shift of the lanes that want high halves. Activations are put in this order
// once, [spans][5 vectors][digits][64], and have a step for each group.
#pragma once
#include <algorithm>

#include "avx512/wide.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

#define HQQTENSOR_HAS_SPANS
constexpr int kSpanQuads = 5, kSpanGroup = 4 * kSpanQuads, kSpanCodes = 16 * kSpanGroup;

// Activations of 8 bits keep a step for each chunk, as everywhere.
inline bool spans_serve(const Weight& w, int digits) {
  return digits > 1 && w.axis == 1 && w.group_size == kSpanGroup && w.groups > 1 && w.nbits == 4 && !w.table.values;
}

// Where the codes of a span lie.
struct Span {
  struct Vector {
    alignas(64) int32_t dword[16];  // from the span's first
    __mmask16 third, high;          // lanes whose dword is in the third vector of 16; whose codes are the high halves
  };
  Vector vectors[kSpanQuads];
  __mmask16 there[3];  // dwords of the row that are read

  // Span s of rows of K codes.
  Span(int64_t K, int64_t s) : vectors(), there() {
    const int64_t begin = first_dword(s), blocks = K / 128, tail = (K % 128 + 7) / 8 * 8;
    for (int v = 0; v < kSpanQuads; ++v)
      for (int l = 0; l < 16; ++l) {
        const int64_t quad = (16 * s + l) * kSpanQuads + v, block = quad / 32, place = quad % 32;
        if (4 * quad >= K) continue;  // its activations are zero
        const int64_t half = block < blocks ? 16 : tail / 8;
        const int64_t dword = block * 16 + place % half - begin;
        vectors[v].dword[l] = (int32_t)dword;
        vectors[v].third |= (__mmask16)((dword >= 32) << l);
        vectors[v].high |= (__mmask16)((place >= half) << l);
        there[dword / 16] |= (__mmask16)(1 << dword % 16);
      }
  }
  static int64_t first_dword(int64_t s) { return s * kSpanQuads / 2 * 16; }
};

// All spans of a row. Those of whole blocks look alike in turns.
struct Spans {
  int64_t K, count, whole;
  Span first, second, ends[2];  // ends: after the whole ones

  explicit Spans(int64_t columns)
      : K(columns), count((columns + kSpanCodes - 1) / kSpanCodes), whole(columns / 128 * 128 / kSpanCodes),
        first(INT32_MAX, 0), second(INT32_MAX, 1), ends{Span(columns, whole), Span(columns, whole + 1)} {}
  const Span& operator[](int64_t s) const { return s >= whole ? ends[s - whole] : s % 2 ? second : first; }

  // Kept for the last few K that the thread met: a model has no more.
  static const Spans& of(int64_t K) {
    thread_local Spans last[4] = {Spans(0), Spans(0), Spans(0), Spans(0)};
    thread_local int next = 0;
    for (const Spans& spans : last)
      if (spans.K == K) return spans;
    return last[next++ % 4] = Spans(K);
  }
};

// The digits of a span's vectors: integers [20][16 groups] as bytes, the highest digit first.
template <int COUNT>
inline void store_span_digits(const __m512i* numbers, int8_t* out) {
  const __m512i half = _mm512_set1_epi32(COUNT == 3 ? 0x8080 : 0x80);  // balanced, see f_store_digits
  for (int v = 0; v < kSpanQuads; ++v) {
    __m512i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm512_xor_si512(_mm512_add_epi32(numbers[4 * v + i], half), half);
    for (int d = 0; d < COUNT; ++d, out += 64) {
      const int low = 8 * (COUNT - 1 - d);  // bit of the digit
      const auto byte = [&](int i) {
        const __m512i b = _mm512_and_si512(_mm512_srli_epi32(n[i], low), _mm512_set1_epi32(255));
        return _mm512_slli_epi32(b, 8 * i);
      };
      _mm512_storeu_si512(out, _mm512_or_si512(_mm512_or_si512(byte(0), byte(1)), _mm512_or_si512(byte(2), byte(3))));
    }
  }
}

// Row m of x, [K], in the order of spans; limit: of the integers. False as for quantize_activations.
inline bool quantize_spans(const float* x, int64_t K, float limit, int64_t m, const QuantizedActivations& d) {
  const int64_t count = Spans::of(K).count, width = padded((K + kSpanGroup - 1) / kSpanGroup);
  const __m512i groups =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kSpanGroup));
  int8_t* out = d.digits + m * d.chunks * d.count * 64;
  float *step = d.step + m * d.steps_per_row, *sum = d.sum + m * width;
  for (int64_t s = 0; s < count; ++s, out += kSpanQuads * d.count * 64) {
    const float* from = x + s * kSpanCodes;
    const int64_t left = K - s * kSpanCodes;
    __m512 number[kSpanGroup];
    __m512i top = _mm512_setzero_si512();
    for (int j = 0; j < kSpanGroup; ++j) {
      const __mmask16 there = _mm512_cmplt_epi32_mask(groups, _mm512_set1_epi32((int)std::min<int64_t>(left, kSpanCodes) - j));
      number[j] = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, groups, from + j, 4);
      top = _mm512_max_epu32(top, _mm512_castps_si512(f_abs(number[j])));  // NaN exceeds all
    }
    const __m512 largest = _mm512_castsi512_ps(top), least = _mm512_set1_ps(1e-28f);
    const __mmask16 small = _mm512_cmp_ps_mask(largest, least, _CMP_LT_OQ) & ~_mm512_cmp_ps_mask(largest, f_zero(), _CMP_EQ_OQ);
    if (small || _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e37f), _CMP_NLT_UQ)) return false;
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(limit), _mm512_max_ps(largest, least));
    const __m512 unit = _mm512_div_ps(largest, _mm512_set1_ps(limit));
    __m512i integer[kSpanGroup], total = _mm512_setzero_si512();
    for (int j = 0; j < kSpanGroup; ++j) {
      integer[j] = _mm512_cvtps_epi32(_mm512_mul_ps(number[j], inverse));
      total = _mm512_add_epi32(total, integer[j]);
    }
    _mm512_storeu_ps(step + 16 * s, unit);
    _mm512_storeu_ps(sum + 16 * s, _mm512_mul_ps(_mm512_cvtepi32_ps(total), unit));
    (d.count == 2 ? store_span_digits<2> : store_span_digits<3>)(integer, out);
  }
  // Behind the last group, where vectors of RowMeta begin within a span and run on.
  for (int64_t g = 16 * count; g < d.steps_per_row; g += 16) _mm512_storeu_ps(step + g, f_zero());
  for (int64_t g = 16 * count; g < width; g += 16) _mm512_storeu_ps(sum + g, f_zero());
  return true;
}

// acc: the sums of kGemvRows rows. prefetch_span(byte): called for each span, which begins at that byte of the rows.
template <int D, class Prefetch>
inline void run_spans(const Spans& spans, const uint8_t* const* rows, const int8_t* x, const float* const* scale, Acc* out,
                      Prefetch prefetch_span) {
  __m512 acc[kGemvRows], last[kGemvRows];
  unrolled<kGemvRows>([&](auto r) { acc[r] = last[r] = _mm512_setzero_ps(); });
  for (int64_t s = 0; s < spans.count; ++s) {
    const Span& span = spans[s];
    const int64_t byte = 4 * Span::first_dword(s);
    prefetch_span(byte);
    __m512i packed[kGemvRows][3], a[D][kGemvRows];
    unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
      for (int i = 0; i < 3; ++i) packed[r][i] = _mm512_maskz_loadu_epi32(span.there[i], rows[r] + byte + 64 * i);
      for (int d = 0; d < D; ++d) a[d][r] = _mm512_setzero_si512();
    });
    unrolled<kSpanQuads>([&](auto v) __attribute__((always_inline)) {
      const Span::Vector& vector = span.vectors[v];
      const __m512i index = _mm512_load_si512(vector.dword);
      __m512i c[kGemvRows];
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
        c[r] = _mm512_permutex2var_epi32(packed[r][0], index, packed[r][1]);
        c[r] = _mm512_mask_permutexvar_epi32(c[r], vector.third, index, packed[r][2]);
        c[r] = keep(15, _mm512_mask_srli_epi32(c[r], vector.high, c[r], 4));
      });
      for (int d = 0; d < D; ++d) {
        const __m512i digits = _mm512_loadu_si512(x + (v * D + d) * 64);
        unrolled<kGemvRows>([&](auto r)
                                __attribute__((always_inline)) { a[d][r] = _mm512_dpbusd_epi32(a[d][r], c[r], digits); });
      }
    });
    x += kSpanQuads * D * 64;
    unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
      const __m512 by = _mm512_loadu_ps(scale[r] + 16 * s);
      acc[r] = scaled(acc[r], _mm512_add_epi32(_mm512_slli_epi32(a[0][r], 8), a[1][r]), by);
      if constexpr (D == 3) last[r] = scaled(last[r], a[2][r], by);  // 32 bits do not hold all three
    });
  }
  unrolled<kGemvRows>([&](auto r) {
    if constexpr (D == 3) acc[r] = _mm512_fmadd_ps(acc[r], _mm512_set1_ps(256), last[r]);
    out[r].v = acc[r];
  });
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
