// y = x W^T for several tokens and more, AVX-512 with VNNI: a panel of 32 rows is transposed so that the lanes of a vector are
// rows, each with 4 neighbouring codes (a quad). A dot-product instruction then adds 4 codes of 16 rows times one token's 4
// activations (a broadcast from memory), and sums stay integers over a whole group: scaling costs one multiplication for each
// group and token where linear_rows pays for each chunk of each row.
//
//   packed rows -> dwords of 16 rows transposed -> planes shifted and masked -> panel [K / 4][digits of a code][2][16 rows][4]
//
//   one vector of the panel, 64 bytes: quad q of rows 16 h .. 16 h + 15
//     byte        0   1    2    3     4   5    6    7      ...   60  61   62   63
//     row              16 h                16 h + 1        ...        16 h + 15
//     column  4 q   +1   +2   +3    4 q   +1   +2   +3     ...  4 q   +1   +2   +3
#pragma once
#include <utility>

#include "avx512/transpose.h"
#include "generic/activations.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPanelDepth = 512;  // columns transposed at a time: 16 KiB for each digit of a code
constexpr int64_t kPanelQuads = kPanelDepth / 4;

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
template <int NB, bool TABLE, int QUADS = 32>
void transpose_block(const uint8_t* const* rows, int64_t offset, const Table& table, __m512i* panel) {
  constexpr int parts = QUADS * NB / 32;
  __m512i t[4 * parts];
  for (int i = 0; i < parts; ++i) transpose16(rows, offset + 16 * i, t + 4 * i);
  put_codes<NB, TABLE>(t, table, panel, std::make_integer_sequence<int, QUADS>());
}

template <int NB, int QUADS = 32>
inline void transpose_rows(const uint8_t* const* rows, int64_t offset, const Table& table, __m512i* panel) {
  if (table.count)
    transpose_block<NB, true, QUADS>(rows, offset, table, panel);
  else
    transpose_block<NB, false, QUADS>(rows, offset, table, panel);
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
    const auto level = [&](int l) __attribute__((always_inline)) { return all[l * T * 2 + j.value]; };
    return _mm512_fmadd_ps(combine_levels<(D > W ? D : W), (W > 1 ? 7 : 8)>(level),
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
  return {.layout = Layout::tiles,
          .tile = tokens_per_tile(digits, w.table.count),
          .max_rows_for_gemv = w.table.values                                   ? 1
                               : w.nbits == 8 || (w.nbits == 4 && quad_rows(w)) ? 3
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

// Runs of kPanelDepth columns, and segments that they have at most.
inline int64_t panel_runs(const Weight& w) { return (w.K + kPanelDepth - 1) / kPanelDepth; }
inline int64_t most_segments(const Weight& w) { return panel_groups(w) + (w.K + 63) / 64 + panel_runs(w); }

int64_t linear_panel_scratch(const Problem& p) {
  const int64_t values = padded(panel_groups(p.w));
  return kPanelQuads * kPanelRows * 3 + 2 * kPanelRows * values + 32 * values + (p.M + 1) * kPanelRows +
         most_segments(p.w) * (int64_t)sizeof(Segment) / 4 + 2 * panel_runs(p.w) + 128;
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
      for (int v = 0; v < 2; ++v) {
        const UnpackedRows<16> tail(rows + 16 * v, offset, NB, w.K - k - b);
        (w.K - k - b > 64 ? transpose_rows<8> : transpose_rows<8, 16>)(tail.rows, 0, w.table, to + v);
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
  float *shift = scale + kPanelRows * values, *lines = shift + kPanelRows * values, *sums = lines + 32 * values;
  Segment* segments = (Segment*)(sums + (p.M + 1) * kPanelRows);
  int64_t* parts = (int64_t*)(segments + most_segments(w));  // segments of each run
  const float unit = code_unit(w, d.count), offset = w.table.offset * w.table.unit;
  const int64_t longest = step_spans_two_chunks(w) ? 128 : 64;  // sums stay within 32 bits over 128 codes
  constexpr int T = tokens_per_tile(D, W);
  const auto depth_from = [&](int64_t k) { return w.K - k < kPanelDepth ? w.K - k : kPanelDepth; };
  Segment* all = segments;
  for (int64_t k = 0; k < w.K; k += kPanelDepth)
    all += parts[k / kPanelDepth] = panel_segments(w, k, depth_from(k), longest, all);
  PanelTile tile;
  tile.panel = panel;
  if (w.axis == 0)
    for (int64_t r = 0; r < kPanelRows; ++r) scale[r] = 1;
  for (int64_t n = first; n < last; n += kPanelRows * step) {
    const PanelRows rows(w, n, step, last);
    if (w.axis == 1) transpose_scales(w, rows.index, kPanelRows, unit, offset, lines, scale, shift, transpose_floats);
    __builtin_memset(sums, 0, sizeof(float) * (size_t)(p.M * kPanelRows));
    const Segment* run = segments;
    for (int64_t k = 0; k < w.K; k += kPanelDepth) {
      const int64_t depth = depth_from(k), count = parts[k / kPanelDepth];
      transpose_columns<W>(w, rows.data, k, depth, panel);
      Prefetcher prefetcher(w, rows.data, rows.after, kPanelRows, k, depth);
      tile.prefetcher = &prefetcher;
      tile.prefetch_lines = (prefetcher.lines() + count - 1) / count;
      for (int64_t m = 0; m < p.M; m += T) {
        const int64_t tokens = p.M - m < T ? p.M - m : T;
        tile.x = d.digits + m * d.chunks * D * 64 + k / 4 * tokens * D * 4;
        tile.out = sums + m * kPanelRows;
        for (int64_t t = 0; t < tokens; ++t) {
          tile.step[t] = d.step + (m + t) * d.steps_per_row;
          tile.sum[t] = d.sum + (m + t) * width;
        }
        pick_panel_tile<D, W>(tokens)(tile, run, count, scale, w.axis == 1 ? shift : nullptr);
      }
      run += count;
    }
    store_panel(p, w.axis == 0 ? d.sum : nullptr, n, step, rows.count, sums);
  }
}

void linear_panel(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  with_digits(p.w, d.count, [&](auto x, auto codes) { run_panel<x.value, codes.value>(p, d, first, last, step, scratch); });
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
