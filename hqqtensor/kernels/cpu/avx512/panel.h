// y = x W^T for several tokens and more, AVX-512 with VNNI: a panel of 32 rows is turned so that the lanes of a vector
// are rows, each with 4 codes that follow one another. A dot-product instruction then adds 4 codes of 16 rows times one
// token's 4 activations (a broadcast from memory), and sums stay integers over a whole group: scaling costs one
// multiplication for each group and token where linear_rows pays for each chunk of each row.
//
//   packed rows -> 16 x 16 bytes turned -> planes shifted and masked -> panel [K / 4][digits of a code][2][16 rows][4]
#pragma once
#include <utility>

#include "avx512/transpose.h"
#include "generic/activations.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPanelDepth = 512;  // columns turned at a time: 16 KiB for each digit of a code
constexpr int64_t kPanelQuads = kPanelDepth / 4;

// Codes 4 J .. 4 J + 3 of each row out of the turned plane of P bits at t, moved to bit LOW of each byte, other bits zero.
template <int P, int LOW, int J>
inline __attribute__((always_inline)) __m512i transposed_plane(const __m512i* t) {
  constexpr int shift = P * (J / (4 * P)) - LOW;
  __m512i v = t[J % (4 * P)];
  if constexpr (shift > 0) v = _mm512_srli_epi32(v, shift);
  if constexpr (shift < 0) v = _mm512_slli_epi32(v, -shift);
  return _mm512_and_si512(v, _mm512_set1_epi8((char)(((1 << P) - 1) << LOW)));
}

// The same out of all planes of a block of 128, which follow one another.
template <int NB, int J>
inline __attribute__((always_inline)) __m512i transposed_codes(const __m512i* t) {
  if constexpr (NB == 8) return t[J];
  __m512i v = _mm512_setzero_si512();
  if constexpr ((NB & 4) != 0) v = transposed_plane<4, 0, J>(t);
  if constexpr ((NB & 2) != 0) v = _mm512_or_si512(v, transposed_plane<2, NB & 4, J>(t + 4 * (NB & 4)));
  if constexpr ((NB & 1) != 0) v = _mm512_or_si512(v, transposed_plane<1, NB & 6, J>(t + 4 * (NB & 6)));
  return v;
}

template <int NB, bool TABLE, int... J>
inline __attribute__((always_inline)) void put_codes(const __m512i* t, const Table& table, __m512i* panel,
                                                     std::integer_sequence<int, J...>) {
  if constexpr (!TABLE) {
    ((panel[2 * J] = transposed_codes<NB, J>(t)), ...);
  } else {
    for (int i = 0; i < table.count; ++i)
      ((panel[2 * (J * table.count + i)] = lookup(transposed_codes<NB, J>(t), table.digits[i])), ...);
  }
}

// The block of 128 codes at `offset` of 16 rows into steps [0, 32) of a panel (every other vector).
template <int NB, bool TABLE>
void transpose_block(const uint8_t* const* rows, int64_t offset, const Table& table, __m512i* panel) {
  __m512i t[4 * NB];
  for (int i = 0; i < NB; ++i) transpose16(rows, offset + 16 * i, t + 4 * i);
  put_codes<NB, TABLE>(t, table, panel, std::make_integer_sequence<int, 32>());
}

template <int NB>
inline void transpose_rows(const uint8_t* const* rows, int64_t offset, const Table& table, __m512i* panel) {
  if (table.count)
    transpose_block<NB, true>(rows, offset, table, panel);
  else
    transpose_block<NB, false>(rows, offset, table, panel);
}

// Activations of T tokens against a part of the panel.
struct PanelTile {
  const __m512i* panel;
  const int8_t* x;        // [steps][T][D][4], from where the panel begins
  const float* step[12];  // steps of a token
  const float* sum[12];   // its sums of groups
  float* out;             // [T][32]
  Prefetcher* prefetcher;
  int64_t prefetch_lines;  // to fetch after each segment
};

// Keeps a value where it is: else gcc 12 moves accumulators about, and to memory, at every step of the loop.
inline __attribute__((always_inline)) void keep_in_register(__m512i& v) { asm("" : "+v"(v)); }

// One step (4 codes) for accumulator I: level I / (2 T), token I / 2 % T, half I % 2; digits d of x and level - d of codes.
template <int D, int W, int T, int I, int d = 0>
inline __attribute__((always_inline)) __m512i dot_quad(__m512i acc, const __m512i* w, const int8_t* x) {
  constexpr int level = I / (2 * T), t = I / 2 % T, v = I % 2, i = level - d;
  if constexpr (i >= 0 && i < W) {
    int32_t four;
    __builtin_memcpy(&four, x + (t * D + d) * 4, 4);
    acc = _mm512_dpbusd_epi32(acc, w[2 * i + v], _mm512_set1_epi32(four));
  }
  if constexpr (d + 1 < D) return dot_quad<D, W, T, I, d + 1>(acc, w, x);
  return acc;
}

// Sums of token J / 2, half J % 2, as floats: its levels put together.
template <int D, int W, int T, int J>
inline __attribute__((always_inline)) __m512 combine_levels(const __m512i* acc) {
  constexpr int L = D > W ? D : W, shift = W > 1 ? 7 : 8;
  __m512i low = acc[(L - 1) * T * 2 + J];
  if constexpr (L > 1) low = _mm512_add_epi32(low, _mm512_slli_epi32(acc[(L - 2) * T * 2 + J], shift));
  if constexpr (L < 3) return _mm512_cvtepi32_ps(low);
  // 32 bits do not hold a whole group's top digits as well.
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[J]), _mm512_set1_ps((float)(1 << (2 * shift))), _mm512_cvtepi32_ps(low));
}

// Steps [w, end) of the panel, all of one group and with one step of the activations; shift: what takes the group's zero
// point out, null where another segment does. The accumulators are arguments by
// value: an array of them would be kept in memory.
template <int D, int W, int T, int... I, int... J, class... Acc>
inline __attribute__((always_inline)) void run_quads(const PanelTile& tile, const __m512i* w, const __m512i* end,
                                                     const int8_t* x, int64_t step, int64_t group, const float* scale,
                                                     const float* shift, std::integer_sequence<int, I...>,
                                                     std::integer_sequence<int, J...>, Acc... acc) {
  do {
    ((acc = dot_quad<D, W, T, I>(acc, w, x)), ...);
    w += 2 * W;
    x += T * D * 4;
    (keep_in_register(acc), ...);
  } while (w != end);
  const __m512i all[] = {acc...};
  const __m512 s[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
  float* out = tile.out;
  const auto scaled = [&](auto j, __m512 old) __attribute__((always_inline)) {
    return _mm512_fmadd_ps(combine_levels<D, W, T, j.value>(all),
                           _mm512_mul_ps(_mm512_set1_ps(tile.step[j.value / 2][step]), s[j.value % 2]), old);
  };
  if (shift) {
    const __m512 z[2] = {_mm512_loadu_ps(shift), _mm512_loadu_ps(shift + 16)};
    ((_mm512_storeu_ps(out + 16 * J,
                       scaled(std::integral_constant<int, J>(), _mm512_fmadd_ps(_mm512_set1_ps(tile.sum[J / 2][group]),
                                                                                z[J % 2], _mm512_loadu_ps(out + 16 * J))))),
     ...);
  } else {
    ((_mm512_storeu_ps(out + 16 * J, scaled(std::integral_constant<int, J>(), _mm512_loadu_ps(out + 16 * J)))), ...);
  }
}

struct Segment {
  int64_t first, last;  // steps of the panel
  int64_t group, step;
  bool opens;  // the first segment of its group, which takes the zero point out
};

template <int D, int W, int T, int... I>
inline __attribute__((always_inline)) void run_segment(const PanelTile& tile, const Segment& s, const float* scale,
                                                       const float* shift, std::integer_sequence<int, I...> all) {
  const int64_t at_group = kPanelRows * s.group;
  run_quads<D, W, T>(tile, tile.panel + 2 * W * s.first, tile.panel + 2 * W * s.last, tile.x + s.first * T * D * 4, s.step,
                     s.group, scale + at_group, s.opens && shift ? shift + at_group : nullptr, all,
                     std::make_integer_sequence<int, 2 * T>(), ((void)I, _mm512_setzero_si512())...);
}

template <int D, int W, int T>
void run_panel_tile(const PanelTile& tile, const Segment* segments, int64_t count, const float* scale, const float* shift) {
  for (int64_t i = 0; i < count; ++i) {
    run_segment<D, W, T>(tile, segments[i], scale, shift, std::make_integer_sequence<int, (D > W ? D : W) * T * 2>());
    tile.prefetcher->run(tile.prefetch_lines);
  }
}

// Tokens of a tile: what 32 registers hold of sums beside the codes.
constexpr int tokens_per_tile(int D, int W) { return W == 3 ? 3 : D == 3 ? 4 : D == 2 || W == 2 ? 6 : 12; }

PanelShape panel_shape(const Weight& w, int64_t, int digits) {
  // Widths that fill a nibble or a byte cost linear_rows least.
  return {.layout = Layout::tiles,
          .tile = tokens_per_tile(digits, w.table.count),
          .max_rows_for_gemv = w.table.values ? 1
                               : w.nbits == 8 ? 6
                               : w.nbits == 4 ? 4
                                              : 2,
          .max_rows_for_integers = costly_as_integers(w, digits) ? 48 : INT64_MAX};
}

using RunPanelTile = void (*)(const PanelTile&, const Segment*, int64_t, const float*, const float*);
template <int D, int W>
RunPanelTile pick_panel_tile(int64_t tokens) {
  RunPanelTile found = nullptr;
  [&]<int... T>(std::integer_sequence<int, T...>) {
    ((tokens == T + 1 ? (void)(found = run_panel_tile<D, W, T + 1>) : (void)0), ...);
  }(std::make_integer_sequence<int, tokens_per_tile(D, W)>());
  return found;
}

int64_t panel_groups(const Weight& w) { return w.axis == 1 ? w.groups : 1; }

int64_t linear_panel_scratch(const Problem& p) {
  const int64_t values = padded(panel_groups(p.w));
  return kPanelQuads * kPanelRows * 3 + 2 * kPanelRows * values + 32 * values + (p.M + 1) * kPanelRows +
         kPanelQuads * (int64_t)sizeof(Segment) / 4 + 128;
}

// Scales (times the unit of codes) and what the sums of x are multiplied with, of 32 rows: [groups][32] each. lines: room
// for 2 x 16 rows.
void transpose_scales(const Weight& w, const int64_t* rows, int digits, float* lines, float* scale, float* shift) {
  const Floats unit = f_set(code_unit(w, digits)), offset = f_set(w.table.offset * w.table.unit);
  const int64_t width = padded(w.groups);
  float *s = lines, *z = lines + 16 * width;
  for (int64_t half = 0; half < kPanelRows; half += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      float *sr = s + r * width, *zr = z + r * width;
      load_values(w.scale, rows[half + r], 0, w.groups, sr);
      if (w.zero.data) load_values(w.zero, rows[half + r], 0, w.groups, zr);
      for (int64_t g = 0; g < w.groups; g += kFloats) {
        const Floats v = f_load(sr + g);
        f_store(zr + g, f_mul(f_sub(f_zero(), v), w.zero.data ? f_load(zr + g) : offset));
        f_store(sr + g, f_mul(v, unit));
      }
    }
    for (int64_t g = 0; g < w.groups; g += 16) {
      transpose_floats(s + g, width, scale + g * kPanelRows + half);
      transpose_floats(z + g, width, shift + g * kPanelRows + half);
    }
  }
}

// The segments of columns [k, k + depth).
int64_t panel_segments(const Weight& w, int64_t k, int64_t depth, Segment* out) {
  // Sums stay within 32 bits over 128 codes.
  const int64_t end = k + depth, longest = step_per_group(w) && w.group_size == 128 ? 128 : 64;
  int64_t count = 0;
  for (int64_t at_k = k; at_k < end;) {
    int64_t stop = (at_k / longest + 1) * longest, group = 0;
    bool opens = at_k == 0;
    if (w.axis == 1 && w.groups > 1) {
      group = at_k / w.group_size;
      opens = at_k % w.group_size == 0;
      const int64_t group_end = (group + 1) * w.group_size;
      stop = group_end < stop ? group_end : stop;
    }
    stop = stop < end ? stop : end;
    out[count++] = {(at_k - k) / 4, (stop - k + 3) / 4, group, step_index(w, at_k / 64), opens};
    at_k = stop;
  }
  return count;
}

// The codes of columns [k, k + depth) of 32 rows into the panel.
template <int W>
void transpose_columns(const Weight& w, const uint8_t* const* rows, int64_t k, int64_t depth, __m512i* panel) {
  with_nbits(w.nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    for (int64_t b = 0; b < depth; b += 128) {
      __m512i* to = panel + 2 * W * (b / 4);
      const int64_t offset = (k + b) / 8 * NB;
      if (k + b + 128 <= w.K) {
        for (int v = 0; v < 2; ++v) transpose_rows<NB>(rows + 16 * v, offset, w.table, to + v);
        continue;
      }
      uint8_t codes[16][128];
      const uint8_t* unpacked[16];
      for (int v = 0; v < 2; ++v) {
        for (int r = 0; r < 16; ++r) {
          unpack_tail(rows[16 * v + r] + offset, NB, (w.K - k - b + 7) / 8 * 8, codes[r]);
          unpacked[r] = codes[r];
        }
        transpose_rows<8>(unpacked, 0, w.table, to + v);
      }
    }
  });
}

template <int D, int W>
void run_panel(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  const Weight& w = p.w;
  const int64_t width = padded(w.groups), values = padded(panel_groups(w));
  __m512i* panel = (__m512i*)scratch;
  float* scale = scratch + kPanelQuads * kPanelRows * 3;
  float *shift = scale + kPanelRows * values, *line = shift + kPanelRows * values, *sums = line + 32 * values;
  Segment* segments = (Segment*)(sums + (p.M + 1) * kPanelRows);
  constexpr int T = tokens_per_tile(D, W);
  PanelTile tile;
  tile.panel = panel;
  if (w.axis == 0)
    for (int64_t r = 0; r < kPanelRows; ++r) scale[r] = 1;
  for (int64_t n = first; n < last; n += kPanelRows * step) {
    const PanelRows<kPanelRows> rows(w, n, step, last);
    if (w.axis == 1) transpose_scales(w, rows.index, d.count, line, scale, shift);
    __builtin_memset(sums, 0, sizeof(float) * (size_t)(p.M * kPanelRows));
    for (int64_t k = 0; k < w.K; k += kPanelDepth) {
      const int64_t depth = w.K - k < kPanelDepth ? w.K - k : kPanelDepth, next = k + kPanelDepth;
      transpose_columns<W>(w, rows.data, k, depth, panel);
      const int64_t parts = panel_segments(w, k, depth, segments);
      const int64_t bytes = (next < w.K && w.K - next < kPanelDepth ? w.K - next : depth) / 8 * w.nbits;
      Prefetcher prefetcher{next < w.K ? rows.data : rows.after, next < w.K ? next / 8 * w.nbits : 0, 0,
                            (bytes + 63) / 64 * kPanelRows};
      tile.prefetcher = &prefetcher;
      tile.prefetch_lines = (prefetcher.count + parts - 1) / parts;
      for (int64_t m = 0; m < p.M; m += T) {
        const int64_t tokens = p.M - m < T ? p.M - m : T;
        tile.x = d.digits + m * d.chunks * D * 64 + k / 4 * tokens * D * 4;
        tile.out = sums + m * kPanelRows;
        for (int64_t t = 0; t < tokens; ++t) {
          tile.step[t] = d.step + (m + t) * d.steps_per_row;
          tile.sum[t] = d.sum + (m + t) * width;
        }
        pick_panel_tile<D, W>(tokens)(tile, segments, parts, scale, w.axis == 1 ? shift : nullptr);
      }
    }
    store_panel(p, d, sums, n, rows.count, step);
  }
}

template <int D>
void run_panel_digits(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step,
                      float* scratch) {
  if (p.w.table.count > 1) return run_panel<D, D == 1 ? 2 : D>(p, d, first, last, step, scratch);
  run_panel<D, 1>(p, d, first, last, step, scratch);
}

void linear_panel(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  if (d.count == 1) return run_panel_digits<1>(p, d, first, last, step, scratch);
  if (d.count == 2) return run_panel_digits<2>(p, d, first, last, step, scratch);
  run_panel_digits<3>(p, d, first, last, step, scratch);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
