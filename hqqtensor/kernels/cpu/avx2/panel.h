// y = x W^T with integers for several tokens and more, AVX2: a panel of rows is transposed so that lanes are rows, sums stay
// integers over a whole group, and scaling costs one multiplication for each group and token.
//   - Activations of 16 bits (16-bit floats; 8-bit ones where codes have more than 6 bits) meet codes of 16 bits:
//     vpmaddwd adds 2 of the 4 codes that each of 4 rows has in a vector.
//   - 8-bit activations meet codes as they are: vpmaddubsw adds 2 of 4 codes of 8 rows into sums of 16 bits, which are
//     widened before they could saturate.
// Activations of 24 bits would need twice the work of float32: linear_dense has them.
#pragma once
#include <utility>

#include "avx2/transpose.h"
#include "generic/activations.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPanelDepth = 256, kPanelQuads = kPanelDepth / 4;  // columns transposed at a time
constexpr int kTileTokens = 6;                                       // 12 of 16 registers hold their sums

inline bool int16_panel(const Weight& w, int digits) { return digits == 2 || w.nbits > 6 || w.table.count > 1; }

// Tokens up to which integer products beat float32 ones. Those of 16 bits are scaled once for each group, and lose where groups
// are small (docs/dev/kernels.md).
inline int64_t max_rows_for_integers(const Weight& w, int digits) {
  if (costly_as_integers(w, digits)) return 6;
  if (digits != 2 || w.axis == 0 || w.groups == 1 || w.group_size >= 64) return INT64_MAX;
  return w.group_size < 32 ? 8 : 32;
}

PanelShape panel_shape(const Weight& w, int64_t, int digits) {
  const bool costly = costly_as_integers(w, digits);
  if (digits == 3)
    return {.layout = Layout::rows, .tile = 0, .max_rows_for_gemv = 3, .max_rows_for_integers = costly ? 3 : INT64_MAX};
  return {.layout = int16_panel(w, digits) ? Layout::tiles_int16 : Layout::tiles,
          .tile = kTileTokens,
          .max_rows_for_gemv = digits == 2 ? 2 : 1,
          .max_rows_for_integers = max_rows_for_integers(w, digits)};
}

// Activations of T tokens against a part of the panel.
struct IntegerTile {
  const int8_t* x;                 // [quads][T][4] integers of 8 or 16 bits, from where the panel begins
  const float* step[kTileTokens];  // steps of a token
  const float* sum[kTileTokens];   // its sums of groups
  float* out;                      // [T][kPanelRows]
  const float *scale, *shift;      // [groups][kPanelRows]; no shift for axis 0
};

// What a token has of two vectors of the panel.
struct Sums {
  __m256i a, b;
};

// Quads of a panel from w to `end` times T tokens: WIDE integers of 16 bits into `total`, else of 8, summed in 16 bits and
// then added to it. In assembly, since gcc 12 keeps moving the 12 sums between registers and memory; sanitizers get the loop
// below.
#if defined(__SANITIZE_ADDRESS__)
template <bool WIDE, int T>
void add_quads(const __m256i* w, const __m256i* end, const int8_t* x, Sums* total) {
  constexpr int bytes = WIDE ? 8 : 4;
  Sums sums[T] = {};
  for (; w != end; w += 2, x += T * bytes)
    for (int t = 0; t < T; ++t) {
      if constexpr (WIDE) {
        const __m256i four = _mm256_set1_epi64x(*(const int64_t*)(x + bytes * t));
        sums[t].a = _mm256_add_epi32(sums[t].a, _mm256_madd_epi16(w[0], four));
        sums[t].b = _mm256_add_epi32(sums[t].b, _mm256_madd_epi16(w[1], four));
      } else {
        const __m256i four = _mm256_set1_epi32(*(const int32_t*)(x + bytes * t));
        sums[t].a = _mm256_add_epi16(sums[t].a, _mm256_maddubs_epi16(w[0], four));
        sums[t].b = _mm256_add_epi16(sums[t].b, _mm256_maddubs_epi16(w[1], four));
      }
    }
  for (int t = 0; t < T; ++t) {
    total[t].a = WIDE ? sums[t].a : _mm256_add_epi32(total[t].a, widen(sums[t].a));
    total[t].b = WIDE ? sums[t].b : _mm256_add_epi32(total[t].b, widen(sums[t].b));
  }
}
#else
// clang-format off
#define HQQTENSOR_ZERO(t, a, b) "vpxor %%ymm" #a ", %%ymm" #a ", %%ymm" #a "\n\tvpxor %%ymm" #b ", %%ymm" #b ", %%ymm" #b "\n\t"
#define HQQTENSOR_WIDE(t, a, b)              \
  "vpbroadcastq 8 * " #t "(%[x]), %%ymm14\n\t" \
  "vpmaddwd %%ymm14, %%ymm12, %%ymm15\n\t"     \
  "vpmaddwd %%ymm14, %%ymm13, %%ymm14\n\t"     \
  "vpaddd %%ymm15, %%ymm" #a ", %%ymm" #a "\n\t" \
  "vpaddd %%ymm14, %%ymm" #b ", %%ymm" #b "\n\t"
#define HQQTENSOR_BYTES(t, a, b)             \
  "vpbroadcastd 4 * " #t "(%[x]), %%ymm14\n\t" \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n\t"   \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"   \
  "vpaddw %%ymm15, %%ymm" #a ", %%ymm" #a "\n\t" \
  "vpaddw %%ymm14, %%ymm" #b ", %%ymm" #b "\n\t"
#define HQQTENSOR_STORE(t, a, b) "vmovdqa %%ymm" #a ", 64 * " #t "(%[total])\n\tvmovdqa %%ymm" #b ", 64 * " #t " + 32(%[total])\n\t"
#define HQQTENSOR_ADD(t, a, b)                                      \
  "vpaddd 64 * " #t "(%[total]), %%ymm" #a ", %%ymm" #a "\n\t"      \
  "vpaddd 64 * " #t " + 32(%[total]), %%ymm" #b ", %%ymm" #b "\n\t" \
  "vmovdqa %%ymm" #a ", 64 * " #t "(%[total])\n\t"                  \
  "vmovdqa %%ymm" #b ", 64 * " #t " + 32(%[total])\n\t"
#define HQQTENSOR_WIDEN(t, a, b)                         \
  "vpmaddwd %[ones], %%ymm" #a ", %%ymm" #a "\n\t"       \
  "vpmaddwd %[ones], %%ymm" #b ", %%ymm" #b "\n\t" HQQTENSOR_ADD(t, a, b)
#define HQQTENSOR_TOKENS1(F) F(0, 0, 1)
#define HQQTENSOR_TOKENS2(F) HQQTENSOR_TOKENS1(F) F(1, 2, 3)
#define HQQTENSOR_TOKENS3(F) HQQTENSOR_TOKENS2(F) F(2, 4, 5)
#define HQQTENSOR_TOKENS4(F) HQQTENSOR_TOKENS3(F) F(3, 6, 7)
#define HQQTENSOR_TOKENS5(F) HQQTENSOR_TOKENS4(F) F(4, 8, 9)
#define HQQTENSOR_TOKENS6(F) HQQTENSOR_TOKENS5(F) F(5, 10, 11)
#define HQQTENSOR_QUADS(TOKENS, step, finish)                                                                      \
  asm volatile(TOKENS(HQQTENSOR_ZERO) "1:\n\tvmovdqa (%[w]), %%ymm12\n\tvmovdqa 32(%[w]), %%ymm13\n\t"            \
               TOKENS(step) "add $64, %[w]\n\tadd %[by], %[x]\n\tcmp %[end], %[w]\n\tjne 1b\n\t" TOKENS(finish)  \
               : [w] "+r"(w), [x] "+r"(x)                                                                           \
               : [end] "r"(end), [by] "i"(T * (WIDE ? 8 : 4)), [total] "r"(total), [ones] "m"(ones)                 \
               : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11",  \
                 "ymm12", "ymm13", "ymm14", "ymm15", "memory", "cc")
// clang-format on

template <bool WIDE, int T>
inline __attribute__((always_inline)) void add_quads(const __m256i* w, const __m256i* end, const int8_t* x, Sums* total) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (WIDE && T == 1) HQQTENSOR_QUADS(HQQTENSOR_TOKENS1, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (WIDE && T == 2) HQQTENSOR_QUADS(HQQTENSOR_TOKENS2, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (WIDE && T == 3) HQQTENSOR_QUADS(HQQTENSOR_TOKENS3, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (WIDE && T == 4) HQQTENSOR_QUADS(HQQTENSOR_TOKENS4, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (WIDE && T == 5) HQQTENSOR_QUADS(HQQTENSOR_TOKENS5, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (WIDE && T == 6) HQQTENSOR_QUADS(HQQTENSOR_TOKENS6, HQQTENSOR_WIDE, HQQTENSOR_STORE);
  if constexpr (!WIDE && T == 1) HQQTENSOR_QUADS(HQQTENSOR_TOKENS1, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
  if constexpr (!WIDE && T == 2) HQQTENSOR_QUADS(HQQTENSOR_TOKENS2, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
  if constexpr (!WIDE && T == 3) HQQTENSOR_QUADS(HQQTENSOR_TOKENS3, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
  if constexpr (!WIDE && T == 4) HQQTENSOR_QUADS(HQQTENSOR_TOKENS4, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
  if constexpr (!WIDE && T == 5) HQQTENSOR_QUADS(HQQTENSOR_TOKENS5, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
  if constexpr (!WIDE && T == 6) HQQTENSOR_QUADS(HQQTENSOR_TOKENS6, HQQTENSOR_BYTES, HQQTENSOR_WIDEN);
}
#endif

// Adds integers of 8 rows, scaled, to a token's results at out. SHIFT: the zero point is taken out as well.
template <bool SHIFT>
inline __attribute__((always_inline)) void add_scaled(__m256i sum, float step, const float* scale, float total,
                                                      const float* shift, float* out) {
  __m256 old = _mm256_load_ps(out);
  if constexpr (SHIFT) old = _mm256_fmadd_ps(_mm256_set1_ps(total), _mm256_load_ps(shift), old);
  _mm256_store_ps(out,
                  _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(_mm256_set1_ps(step), _mm256_load_ps(scale)), old));
}

template <bool WIDE, bool SHIFT, int... t>
inline __attribute__((always_inline)) void add_segment(const IntegerTile& tile, const Segment& s, const Sums* total,
                                                       std::integer_sequence<int, t...>) {
  float* const out = tile.out;
  const float *scale = tile.scale + s.group * kPanelRows, *shift = SHIFT ? tile.shift + s.group * kPanelRows : nullptr;
  const auto add = [&](int token, const Sums& sums) __attribute__((always_inline)) {
    const float step = tile.step[token][s.step], x = SHIFT ? tile.sum[token][s.group] : 0;
    float* to = out + token * kPanelRows;
    if constexpr (WIDE) {  // of rows 0, 1, 4, 5 and of rows 2, 3, 6, 7: two sums each
      add_scaled<SHIFT>(_mm256_hadd_epi32(sums.a, sums.b), step, scale, x, shift, to);
    } else {
      add_scaled<SHIFT>(sums.a, step, scale, x, shift, to);
      add_scaled<SHIFT>(sums.b, step, scale + 8, x, SHIFT ? shift + 8 : nullptr, to + 8);
    }
  };
  (add(t, total[t]), ...);
}

// fit: quads whose sums fit 16 bits; any number for integers of 16 bits (WIDE).
template <bool WIDE, int... t>
inline __attribute__((always_inline)) void run_segment(const IntegerTile& tile, const Segment& s, const __m256i* w, int64_t fit,
                                                       std::integer_sequence<int, t...> all) {
  constexpr int T = (int)sizeof...(t), bytes = WIDE ? 8 : 4;
  const __m256i* const end = w + 2 * s.last;
  const int8_t* x = tile.x + s.first * T * bytes;
  w += 2 * s.first;
  Sums total[T];
  const __m256i zero = _mm256_setzero_si256();
  if constexpr (!WIDE) ((total[t] = {zero, zero}), ...);  // sums of 16 bits are added
  for (; !WIDE && end - w > 2 * fit; w += 2 * fit, x += fit * T * bytes) add_quads<false, T>(w, w + 2 * fit, x, total);
  add_quads<WIDE, T>(w, end, x, total);
  if (tile.shift && s.opens)
    add_segment<WIDE, true>(tile, s, total, all);
  else
    add_segment<WIDE, false>(tile, s, total, all);
}

template <bool WIDE, int T>
void integer_tile(const IntegerTile& tile, const Segment* segments, int64_t count, const __m256i* panel, int64_t fit) {
  for (int64_t i = 0; i < count; ++i) run_segment<WIDE>(tile, segments[i], panel, fit, std::make_integer_sequence<int, T>());
}

using IntegerRun = void (*)(const IntegerTile&, const Segment*, int64_t, const __m256i*, int64_t);
template <bool WIDE, int... T>
IntegerRun pick_tokens(int64_t tokens, std::integer_sequence<int, T...>) {
  static constexpr IntegerRun runs[] = {integer_tile<WIDE, T + 1>...};
  return runs[tokens - 1];
}
inline IntegerRun pick_integer(bool wide, int64_t tokens) {
  constexpr auto all = std::make_integer_sequence<int, kTileTokens>();
  return wide ? pick_tokens<true>(tokens, all) : pick_tokens<false>(tokens, all);
}
// Quads of codes up to `top` whose sums fit 16 bits: 16 x 2 x 7 x 127 < 2^15.
inline int64_t quads_that_fit(int top) { return top <= 7 ? 16 : top <= 15 ? 8 : top <= 31 ? 4 : 2; }

// What 2 digits of 7 bits of a table lack to be signed integers of 14 bits. Sums of 32 products with 14-bit activations
// then fit 32 bits; unsigned, those of 16. Axis 0 has no sums of x to put the difference right with.
inline int table_middle(const Weight& w) { return w.axis == 1 && w.table.count > 1 ? 8192 : 0; }

inline int64_t longest_segment(const Weight& w, int digits) {
  if (digits == 2 && w.table.count > 1) return w.axis == 1 ? 32 : 16;
  return step_spans_two_chunks(w) ? 128 : 64;
}

// The segments of all panels, from columns 0, kPanelDepth, ... on: those of panel i are [starts[i], starts[i + 1]).
void all_segments_of(const Weight& w, int64_t longest, Segment* out, int64_t* starts) {
  int64_t count = 0;
  for (int64_t k = 0; k < w.K; k += kPanelDepth) {
    *starts++ = count;
    count += panel_segments(w, k, w.K - k < kPanelDepth ? w.K - k : kPanelDepth, longest, out + count);
  }
  *starts = count;
}

// Numbers of a table in place of codes: bytes, and where `high` is given their high bytes.
struct TableBytes {
  __m256i low, high;
  explicit TableBytes(const Table& table, int middle) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      const int number = table.count > 1 ? table.digits[0][i] * 128 + table.digits[1][i] - middle : table.digits[0][i];
      bytes[0][i] = (uint8_t)number;
      bytes[1][i] = (uint8_t)((uint16_t)number >> 8);
    }
    low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
    high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
  }
};

// Columns [k, k + depth) as a panel of add_quads: WIDE [4 vectors][kPanelQuads][2], else [2 pairs][kPanelQuads][2].
void integer_columns(const Weight& w, const uint8_t* const* rows, int64_t pairs, int64_t k, int64_t depth, bool wide,
                     __m256i* panel) {
  if (wide && w.table.count == 0) return transpose_codes<true>(w, rows, pairs, k, depth, kPanelQuads, panel);
  if (!wide) transpose_codes<false>(w, rows, pairs, k, depth, kPanelQuads, panel);
  if (w.table.count == 0) return;
  const TableBytes table(w.table, table_middle(w));
  if (!wide) {
    for (int64_t i = 0; i < pairs * kPanelQuads * 2; ++i) panel[i] = _mm256_shuffle_epi8(table.low, panel[i]);
    return;
  }
  __m256i codes[kPanelPairs * 32 * 2];
  for (int64_t b = 0; b < depth; b += 128) {
    transpose_codes<false>(w, rows, pairs, k + b, depth - b < 128 ? depth - b : 128, 32, codes);
    for (int64_t v = 0; v < 2 * pairs; ++v) {
      const __m256i* from = codes + v / 2 * 64 + v % 2;
      __m256i* to = panel + 2 * (v * kPanelQuads + b / 4);
      for (int q = 0; q < 32; ++q, from += 2, to += 2) {
        const __m256i low = _mm256_shuffle_epi8(table.low, *from), high = _mm256_shuffle_epi8(table.high, *from);
        to[0] = _mm256_unpacklo_epi8(low, high);
        to[1] = _mm256_unpackhi_epi8(low, high);
      }
    }
  }
}

int64_t linear_panel_scratch(const Problem& p) {
  const int64_t values = padded(panel_groups(p.w));
  return kPanelQuads * 4 * 16 + (2 * kPanelRows + 16) * values + (p.M + 1) * kPanelRows +
         ((p.w.K + 3) / 4 + 1) * (int64_t)sizeof(Segment) / 4 + (p.w.K / kPanelDepth + 2) * 2 + 128;
}

void linear_panel(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  const Weight& w = p.w;
  const int64_t width = padded(w.groups), values = padded(panel_groups(w));
  __m256i* panel = (__m256i*)scratch;
  float *scale = scratch + kPanelQuads * 4 * 16, *shift = scale + kPanelRows * values;
  float *lines = shift + kPanelRows * values, *sums = lines + 16 * values;
  Segment* all_segments = (Segment*)(sums + (p.M + 1) * kPanelRows);
  int64_t* starts = (int64_t*)(all_segments + (w.K + 3) / 4 + 1);
  all_segments_of(w, longest_segment(w, d.count), all_segments, starts);
  const int64_t fit = quads_that_fit(w.table.count ? 31 : (1 << w.nbits) - 1);
  const bool wide = d.layout == Layout::tiles_int16;
  const int64_t bytes_each = d.bytes() * 4;  // of 4 activations
  const float unit = w.table.values ? w.table.unit : 1;
  const float offset = (w.table.offset - (float)table_middle(w)) * w.table.unit;
  if (w.axis == 0)  // whose steps have the table's unit already, times what digits left out would be
    for (int64_t r = 0; r < kPanelRows; ++r) scale[r] = unit / code_unit(w, d.count);
  for (int64_t n = first; n < last; n += kPanelRows * step) {
    const PanelRows rows(w, n, step, last);
    const int64_t pairs = (rows.count + kPairRows - 1) / kPairRows, pieces = wide ? (rows.count + 7) / 8 : pairs;
    if (w.axis == 1) transpose_scales(w, rows.index, pairs * kPairRows, unit, offset, lines, scale, shift, transpose_floats);
    __builtin_memset(sums, 0, sizeof(float) * (size_t)(p.M * kPanelRows));
    for (int64_t k = 0; k < w.K; k += kPanelDepth) {
      const int64_t depth = w.K - k < kPanelDepth ? w.K - k : kPanelDepth;
      integer_columns(w, rows.data, pairs, k, depth, wide, panel);
      const Segment* segments = all_segments + starts[k / kPanelDepth];
      const int64_t parts = starts[k / kPanelDepth + 1] - starts[k / kPanelDepth];
      Prefetcher prefetcher(w, rows.data, rows.after, pairs * kPairRows, k, depth);
      const int64_t lines_each = prefetcher.lines() / ((p.M + d.tile - 1) / d.tile * pieces) + 1;
      for (int64_t m = 0; m < p.M; m += d.tile) {
        const int64_t tokens = p.M - m < d.tile ? p.M - m : d.tile;
        IntegerTile tile;
        tile.x = d.digits + m * d.chunks * d.bytes() * 64 + k / 4 * tokens * bytes_each;
        for (int64_t t = 0; t < tokens; ++t) {
          tile.step[t] = d.step + (m + t) * d.steps_per_row;
          tile.sum[t] = d.sum + (m + t) * width;
        }
        const IntegerRun run = pick_integer(wide, tokens);
        for (int64_t i = 0; i < pieces; ++i) {
          const int64_t row = i * (wide ? 8 : kPairRows);
          tile.out = sums + m * kPanelRows + row;
          tile.scale = scale + row;
          tile.shift = w.axis == 1 ? shift + row : nullptr;
          run(tile, segments, parts, panel + i * 2 * kPanelQuads, fit);
          prefetcher.run(lines_each);
        }
      }
    }
    store_panel(p, w.axis == 0 ? d.sum : nullptr, n, step, rows.count, sums);
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
