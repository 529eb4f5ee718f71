// y = x W^T for several tokens and more, AMX: codes of 16 rows, a byte each as they lie, times the digits of 16 tokens. Sums
// are integers over a chunk of 64 columns or a group within it, for groups of 128 over both chunks; then they are scaled
// by vectors whose lanes are tokens.
//
//   packed rows -> panel [2 halves][chunks][digits of a code][16 rows][64 codes]
//   digits of a tile of tokens [chunks][digits][16 quads][tokens][4]     (QuantizedActivations::apart)
#pragma once
#include <algorithm>

#include "amx/bytes.h"
#include "amx/tiles.h"
#include "avx512/transpose.h"
#include "dispatch/targets.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kMinRowsForAmx = 16;  // M from which AMX is used: a tile of fewer tokens takes as long
constexpr int64_t kPanelChunks = 8;     // of 64 columns at a time: 16 KiB for each digit of a code

// True where groups are chunks, or long enough parts of them: a product costs the same for 8 columns as for 64.
inline bool amx_serves(const Weight& w) { return w.axis == 0 || (chunk_groups(w) && (w.groups == 1 || w.group_size >= 32)); }

// Columns whose products are one sum of integers.
struct AmxSegment {
  int64_t chunk, chunks;  // from the panel's first; 2: a group of 128, whose chunks have the same step
  int64_t byte;           // of a chunk, where the run begins
  int64_t group, step;    // what it is scaled by
};
int64_t amx_segments(const Weight& w, int64_t first, int64_t chunks, AmxSegment* out) {
  const int64_t parts = steps_of_chunk(w), each = step_spans_two_chunks(w) ? 2 : 1;
  int64_t count = 0;
  for (int64_t c = 0; c < chunks; c += each)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t column = 64 * (first + c), group = w.axis == 1 && w.groups > 1 ? column / w.group_size + part : 0;
      out[count++] = {c, std::min(each, chunks - c), 64 / parts * part, group, step_index(w, first + c)};
    }
  return count;
}

// 16 rows, some chunks and a tile of tokens.
struct AmxTile {
  const uint8_t* panel;  // [chunks][digits of a code][16][64]
  const int8_t* x;       // of the first chunk
  int64_t tokens;
  const float* scale;  // of the first row; rows scale_stride apart
  int64_t scale_stride;
  const float* step;    // [entries][16]
  float* sums;          // [16 rows][16 tokens]
  int32_t* level_sums;  // [2][3][16][16]
};

// The sums of row r over all levels.
template <int L, int SHIFT>
inline __attribute__((always_inline)) __m512 tile_sum(const int32_t* level_sums, int r) {
  return combine_levels<L, SHIFT>(
      [=](int l) __attribute__((always_inline)) { return _mm512_load_si512(level_sums + l * 256 + r * 16); });
}

// One chunk, or a part of it: digit i of the codes times digit d of the activations goes to level i + d, what falls below the
// last level is left out.
template <int D, int W, int I = 0, int X = 0>
inline __attribute__((always_inline)) void chunk_dots(const uint8_t* codes, const int8_t* x, int64_t tokens) {
  constexpr int L = D > W ? D : W;
  if constexpr (X == 0) tile_load<3 + I % 2>(codes + I * 1024, 64);
  tile_load<5 + X>(x + X * tokens * 64, tokens * 4);
  tile_dot<I + X, 3 + I % 2, 5 + X>();
  if constexpr (X + 1 < D && I + X + 1 < L)
    chunk_dots<D, W, I, X + 1>(codes, x, tokens);
  else if constexpr (I + 1 < W)
    chunk_dots<D, W, I + 1, 0>(codes, x, tokens);
}

template <int L, int I = 0>
inline __attribute__((always_inline)) void each_level(int32_t* level_sums) {
  if (level_sums)
    tile_store<I>(level_sums + I * 256, 64);
  else
    tile_zero<I>();
  if constexpr (I + 1 < L) each_level<L, I + 1>(level_sums);
}

template <int D, int W>
void amx_tile(const AmxSegment* segments, int64_t count, const AmxTile& t) {
  constexpr int L = D > W ? D : W;
  __m512 acc[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) acc[r] = _mm512_load_ps(t.sums + 16 * r);
  const auto level_sums = [&](int64_t i) { return t.level_sums + i % 2 * (3 * 256); };
  const auto multiply = [&](int64_t i) __attribute__((always_inline)) {
    const AmxSegment& segment = segments[i];
    each_level<L>(nullptr);
    const uint8_t* codes = t.panel + segment.chunk * W * 1024 + segment.byte;
    const int8_t* x = t.x + (segment.chunk * D * 16 + segment.byte / 4) * t.tokens * 4;
    for (int64_t c = 0; c < segment.chunks; ++c, codes += W * 1024, x += D * t.tokens * 64)
      chunk_dots<D, W>(codes, x, t.tokens);
    each_level<L>(level_sums(i));
  };
  multiply(0);
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) multiply(i + 1);  // while the sums of this one are on their way through memory
    const float* scale = t.scale + segments[i].group;
    const __m512 step = _mm512_load_ps(t.step + 16 * segments[i].step);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const __m512 sum = tile_sum<L, (W > 1 ? 7 : 8)>(level_sums(i), r);
      acc[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(step, _mm512_set1_ps(scale[r * t.scale_stride])), acc[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_store_ps(t.sums + 16 * r, acc[r]);
}

// What a tile of tokens has for its lanes: [entries][16] steps, [groups][16] sums of x. Lanes of tokens that are none hold
// numbers of no meaning.
void transpose_per_token(const float* from, int64_t stride, int64_t tokens, int64_t count, float* to) {
  const uint8_t* rows[16];
  for (int64_t t = 0; t < 16; ++t) rows[t] = (const uint8_t*)(from + (t < tokens ? t : 0) * stride);
  for (int64_t i = 0; i < count; i += 4) transpose16(rows, 4 * i, (__m512i*)(to + 16 * i));
}

// Sums of 32 rows begin with what takes zero points out: shift [32][width] times the sums of x [groups][16].
void begin_tile(const float* shift, int64_t width, const float* sums_x, int64_t groups, float* sums) {
  for (int64_t r = 0; r < kPanelRows; r += 8, sums += 8 * 16) {
    __m512 acc[8] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const __m512 x = _mm512_load_ps(sums_x + 16 * g);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i] = _mm512_fmadd_ps(x, _mm512_set1_ps(shift[(r + i) * width + g]), acc[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm512_store_ps(sums + 16 * i, acc[i]);
  }
}

// Codes of chunks [first, first + chunks) of 32 rows into the panel, W digits of each.
void unpack_panel(const Weight& w, int64_t W, const uint8_t* const* rows, int64_t first, int64_t chunks, uint8_t* panel) {
  with_nbits(w.nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    const auto put = [&](int64_t r, int64_t c, Codes codes) __attribute__((always_inline)) {
      uint8_t* to = panel + ((r / 16 * kPanelChunks + c) * W * 16 + r % 16) * 64;
      if (w.table.count == 0) return _mm512_store_si512(to, codes);
      for (int i = 0; i < W; ++i) _mm512_store_si512(to + 1024 * i, lookup(codes, w.table.digits[i]));
    };
    for (int64_t r = 0; r < kPanelRows; ++r)
      for (int64_t c = 0; c < chunks; c += 2) {
        const int64_t column = 64 * (first + c);
        const uint8_t* from = rows[r] + column / 8 * NB;
        if (column + 128 <= w.K) {
          put(r, c, decode<NB, 0>(from));
          put(r, c + 1, decode<NB, 1>(from));
          continue;
        }
        uint8_t codes[128] = {};
        unpack_last<NB>(from, w.K - column, codes);
        put(r, c, load_codes(codes));
        if (c + 1 < chunks) put(r, c + 1, load_codes(codes + 64));
      }
  });
}

// The scratch memory of a call, in floats.
struct AmxScratch {
  int64_t panel, level_sums, width, tiles, entries, groups, sums;

  AmxScratch(const Weight& w, int64_t M)
      : panel(2 * kPanelChunks * 3 * 1024 / 4), level_sums(6 * 256), width(padded(w.axis == 1 ? w.groups : 1)),
        tiles((M + 15) / 16), entries(steps_per_row(w)), groups(w.axis == 1 ? padded(w.groups) : 0),
        sums(tiles * kPanelRows * 16) {}
  int64_t floats() const {
    return panel + level_sums + 2 * kPanelRows * width + tiles * 16 * (entries + groups) + 2 * sums + 128;
  }
};

// The sums of all tokens, see above; zeros for axis 0.
inline void begin_sums(const Weight& w, const AmxScratch& size, const float* shift, const float* sums_x, float* sums) {
  if (w.axis == 0) return (void)__builtin_memset(sums, 0, sizeof(float) * (size_t)size.sums);
  for (int64_t t = 0; t < size.tiles; ++t)
    begin_tile(shift, size.width, sums_x + t * 16 * size.groups, w.groups, sums + t * 16 * kPanelRows);
}

// Sums [tokens / 16][2 halves][16 rows][16 tokens] to [tokens][32 rows].
inline void transpose_sums(const float* sums, int64_t tiles, float* out) {
  for (int64_t i = 0; i < 2 * tiles; ++i) transpose_floats(sums + 256 * i, 16, out + i / 2 * 16 * kPanelRows + i % 2 * 16);
}

using RunAmxTile = void (*)(const AmxSegment*, int64_t, const AmxTile&);

// D digits of the activations, W of the codes: what `run` multiplies.
void run_amx_panel(const Problem& p, const QuantizedActivations& d, int64_t D, int64_t W, RunAmxTile run, int64_t first,
                   int64_t last, int64_t step, float* scratch) {
  const Weight& w = p.w;
  const AmxScratch size(w, p.M);
  const auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += (floats + 15) / 16 * 16;
    return at;
  };
  uint8_t* panel = (uint8_t*)take(size.panel);
  int32_t* level_sums = (int32_t*)take(size.level_sums);
  float *steps = take(size.tiles * 16 * size.entries), *sums_x = take(size.tiles * 16 * size.groups), *sums = take(size.sums);
  float *scale = take(kPanelRows * size.width), *shift = take(kPanelRows * size.width), *result = take(size.sums);
  for (int64_t m = 0; m < p.M; m += 16) {
    transpose_per_token(d.step + m * size.entries, size.entries, p.M - m, size.entries, steps + m * size.entries);
    if (w.axis == 1) transpose_per_token(d.sum + m * size.groups, size.groups, p.M - m, size.groups, sums_x + m * size.groups);
  }
  if (w.axis == 0)
    for (int64_t r = 0; r < kPanelRows; ++r) scale[r * size.width] = 1;
  const float unit = code_unit(w, d.count), offset = w.table.offset * w.table.unit;
  const uint8_t k_bytes = (uint8_t)(64 / steps_of_chunk(w)), quads = (uint8_t)(16 / steps_of_chunk(w));
  AmxSegment segments[2 * kPanelChunks];
  const auto tiles = [&](int64_t tokens) {
    const Tiles::Shape codes{16, k_bytes}, x{quads, (uint16_t)(4 * tokens)}, sum{16, (uint16_t)(4 * tokens)};
    return Tiles({sum, sum, sum, codes, codes, x, x, x});
  };
  for (int64_t n = first; n < last; n += kPanelRows * step) {
    const PanelRows rows(w, n, step, last);
    if (w.axis == 1) scale_and_shift(w, rows.index, kPanelRows, unit, offset, size.width, scale, shift);
    begin_sums(w, size, shift, sums_x, sums);
    for (int64_t c = 0; c < d.chunks; c += kPanelChunks) {
      const int64_t chunks = d.chunks - c < kPanelChunks ? d.chunks - c : kPanelChunks;
      unpack_panel(w, W, rows.data, c, chunks, panel);
      const int64_t count = amx_segments(w, c, chunks, segments);
      Prefetcher prefetcher(w, rows.data, rows.after, kPanelRows, 64 * c, 64 * chunks);
      const int64_t lines_each = prefetcher.lines() / (2 * size.tiles) + 1;
      const auto multiply = [&](int64_t m, int64_t tokens) {
        for (int64_t half = 0; half < 2; ++half) {
          run(segments, count,
              {panel + half * kPanelChunks * W * 1024, d.digits + m * d.chunks * D * 64 + c * D * tokens * 64, tokens,
               scale + half * 16 * size.width, size.width, steps + m * size.entries, sums + (m * kPanelRows + half * 256),
               level_sums});
          prefetcher.run(lines_each);
        }
      };
      const int64_t whole = p.M / 16 * 16;
      if (whole) {
        const Tiles full = tiles(16);
        for (int64_t m = 0; m < whole; m += 16) multiply(m, 16);
      }
      if (whole < p.M) {
        const Tiles rest = tiles(p.M - whole);
        multiply(whole, p.M - whole);
      }
    }
    transpose_sums(sums, size.tiles, result);
    store_panel(p, w.axis == 0 ? d.sum : nullptr, n, step, rows.count, result);
  }
}

void linear_amx(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  with_digits(p.w, d.count, [&](auto x, auto codes) {
    run_amx_panel(p, d, x.value, codes.value, amx_tile<x.value, codes.value>, first, last, step, scratch);
  });
}

void linear_panel(const Problem& p, const QuantizedActivations& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  (d.layout == Layout::tiles_by_digit ? linear_amx : kernels_avx512()->linear_panel)(p, d, first, last, step, scratch);
}

int64_t linear_panel_scratch(const Problem& p) {
  return std::max(AmxScratch(p.w, p.M).floats(), kernels_avx512()->linear_panel_scratch(p));
}

// Measured: M from which bf16 splits are faster than integers.
int64_t max_rows_for_integers(const Weight& w, int digits) {
  if (digits == 1 || (w.axis == 1 && amx_serves(w))) return INT64_MAX;
  if (w.axis == 0) return w.group_size < 64 ? 8 : digits == 3 ? 32 : 16;
  return digits == 3 ? 96 : 48;
}

// Measured: M from which numbers rounded to bf16 are faster than integers.
int64_t max_rows_unrounded(const Weight& w) {
  if (w.axis == 0) return 8;
  return !w.table.values && amx_serves(w) && (w.groups == 1 || w.group_size >= 64) ? 16 : 15;
}

// Measured: M from which 8-bit weights are faster than sums for each group.
int64_t max_rows_before_bytes(const Weight& w) {
  if (w.table.values && w.nbits == 8) return INT64_MAX;  // a code is NaN, and bytes are not
  if (can_look_bytes_up(w)) return w.groups == 1 || w.group_size >= 64 ? 16 : 15;
  return amx_serves(w) ? 96 : 23;
}

PanelShape panel_shape(const Weight& w, int64_t M, int digits) {
  PanelShape shape = kernels_avx512()->panel_shape(w, M, digits);
  if (amx_serves(w) && M >= kMinRowsForAmx) shape.tile = 16, shape.layout = Layout::tiles_by_digit;
  shape.max_rows_for_integers = max_rows_for_integers(w, digits);
  shape.max_rows_unrounded = max_rows_unrounded(w);
  if (w.axis == 1 && digits == 1) shape.max_rows_before_bytes = max_rows_before_bytes(w);
  return shape;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
