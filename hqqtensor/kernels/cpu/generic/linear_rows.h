// y = x W^T for few rows of x: each packed row is read once and multiplied as integers.
//
// Activations come as integers of up to 24 bits in digits of 8 (`prepare`), so that a product of 64 codes with 64
// activations is three dot-product instructions instead of four conversions and four multiplications; a chunk is
// summed exactly and scaled once. The zero point leaves through the sums of x over each group:
//   sum_k (c_k - z) s x_k = s sum_k c_k x_k - s z sum_k x_k.
// Numbers of a table come as digits as well (struct Table), with its offset in the zero point's place.
#pragma once
#include <optional>

#include "generic/row_meta.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

struct Tile {
  const uint8_t* rows[kGemvRows];
  const int8_t* x[kGemvTokens];
  const float* scale[kGemvRows][kGemvTokens];
  Floats start[kGemvRows][kGemvTokens];  // what is added to the lanes of a result
  const uint8_t* table;
  const uint8_t* prefetch_from;  // where rows follow one another: the tile after the next, fetched while this one is multiplied
  int64_t prefetch_distance;     // else bytes to the same place in the next tile
  float out[kGemvTokens][kGemvRows];
  const Quads* quads;
  const float* step[kGemvTokens];  // where quads have scales, of each chunk

  // Fetches bytes [at, at + BYTES) of the next rows.
  template <int BYTES>
  void prefetch_rows(int64_t at) const {
    if (prefetch_from) {
      for (int i = 0; i < kGemvRows * BYTES; i += 64) prefetch(prefetch_from + at * kGemvRows + i);
    } else {
      for (int r = 0; r < kGemvRows; ++r)
        for (int i = 0; i < BYTES; i += 64) prefetch(rows[r] + at + prefetch_distance + i);
    }
  }
};

// DW: digits of a table.
template <int NB, int D, int DW, int T, ScaleOf BY>
void run_tile(Tile& tile, int64_t K, int64_t per_chunk, const LaneScales& lanes) {
  const int64_t blocks = K / 128, tail = K % 128;
  Acc acc[kGemvRows][T] = {};
  constexpr int W = DW ? DW : 1;
  const auto half = [&](int64_t chunk, const Codes(*codes)[2 * W]) __attribute__((always_inline)) {
    for (int t = 0; t < T; ++t) {
      const ChunkDigits x = load_chunk_digits<D>(tile.x[t] + chunk * D * 64);
      for (int r = 0; r < kGemvRows; ++r) {
        const float* s = tile.scale[r][t] + (BY == ScaleOf::lanes ? chunk * per_chunk : chunk);
        if constexpr (BY == ScaleOf::quads) {
          add_chunk_quads<NB, D, DW>(acc[r][t], codes[r], x, tile.scale[r][t] + tile.quads->chunk_first(chunk),
                                     tile.quads->chunk_index(chunk), tile.step[t][chunk]);
        } else if constexpr (BY == ScaleOf::lanes)
          add_chunk_lanes<NB, D, DW>(acc[r][t], codes[r], x, s, lanes);
        else
          add_chunk<NB, D, DW>(acc[r][t], codes[r], x, s);
      }
    }
  };
  const auto numbers = [&](Codes c, Codes* out) __attribute__((always_inline)) {
    if constexpr (DW == 0)
      out[0] = c;
    else
      for (int i = 0; i < DW; ++i) out[i] = lookup(c, tile.table + 16 * i);
  };
  const auto prefetch_block = [&](int64_t b) __attribute__((always_inline)) {
    if (tile.prefetch_from) {
      for (int i = 0; i < kGemvRows * NB / 4; ++i) prefetch(tile.prefetch_from + (b * (kGemvRows * NB / 4) + i) * 64);
    } else if (NB >= 4 || (b * 16 * NB & 63) < 16 * NB) {  // once for each line
      for (int r = 0; r < kGemvRows; ++r)
        for (int i = 0; i < NB; i += 4) prefetch(tile.rows[r] + b * 16 * NB + tile.prefetch_distance + 16 * i);
    }
  };
  constexpr bool wide = Wide<NB>::serve && DW == 0 && BY == ScaleOf::chunk, pairs = Pairs<NB>::serve && !wide;
  int64_t done = 0;
  if constexpr (wide) {
    done = blocks / Wide<NB>::blocks * Wide<NB>::blocks;
    Wide<NB>::template run<D>(tile.rows, tile.x[0], &tile.scale[0][0], done, &acc[0][0], prefetch_block);
  }
  Codes codes[kGemvRows][2 * W];
  for (int64_t b = done; b < blocks; ++b) {
    prefetch_block(b);
    if constexpr (pairs) {
      for (int r = 0; r < kGemvRows; ++r) {
        const uint8_t* p = tile.rows[r] + b * 16 * NB;
        Codes first, second;
        Pairs<NB>::template decode<codes_in_place(D, DW > 0)>(p, first, second);
        numbers(first, codes[r]);
        numbers(second, codes[r] + W);
      }
      for (int t = 0; t < T; ++t) {
        const int8_t* at = tile.x[t] + b * D * 128;
        const ChunkDigits x[2] = {load_chunk_digits<D>(at), load_chunk_digits<D>(at + D * 64)};
        if constexpr (BY == ScaleOf::quads) {
          for (int r = 0; r < kGemvRows; ++r)
            Pairs<NB>::template add_quads<D, DW>(acc[r][t], codes[r], x, tile.scale[r][t] + tile.quads->first[b],
                                                 tile.quads->index + 32 * b, tile.step[t] + 2 * b);
          continue;
        }
        for (int r = 0; r < kGemvRows; ++r) {
          const typename Pairs<NB>::Sums sum = Pairs<NB>::template dot<D, DW>(codes[r], x);
          const float* s = tile.scale[r][t] + (BY == ScaleOf::lanes ? 2 * b * per_chunk : 2 * b);
          if constexpr (BY == ScaleOf::lanes)
            Pairs<NB>::add_lanes(acc[r][t], sum, s, lanes);
          else
            Pairs<NB>::add(acc[r][t], sum, s);
        }
      }
    } else {
      for (int r = 0; r < kGemvRows; ++r) {
        const uint8_t* p = tile.rows[r] + b * 16 * NB;
        numbers(decode<NB, 0>(p), codes[r]);
      }
      half(2 * b, codes);
      for (int r = 0; r < kGemvRows; ++r) numbers(decode<NB, 1>(tile.rows[r] + b * 16 * NB), codes[r]);
      half(2 * b + 1, codes);
    }
  }
  if constexpr (pairs && codes_in_place(D, DW > 0))
    for (int r = 0; r < kGemvRows; ++r)
      for (int t = 0; t < T; ++t) Pairs<NB>::finish(acc[r][t]);
  const auto whole_half = [&](auto codes_of) __attribute__((always_inline)) {
    for (int r = 0; r < kGemvRows; ++r) numbers(codes_of(r), codes[r]);
  };
#ifdef HQQTENSOR_HAS_HALF_BLOCK
  if (tail == 64) {
    whole_half([&](int r) __attribute__((always_inline)) { return decode_half<NB>(tile.rows[r] + blocks * 16 * NB); });
    half(2 * blocks, codes);
  } else
#endif
      if (tail) {
    uint8_t unpacked[kGemvRows][128];
    for (int r = 0; r < kGemvRows; ++r) {
      if (tail != 64) __builtin_memset(unpacked[r] + 32, 0, 96);
      unpack_last<NB>(tile.rows[r] + blocks * 16 * NB, tail, unpacked[r]);
    }
    for (int h = 0; h < (tail > 64 ? 2 : 1); ++h) {
      whole_half([&](int r) __attribute__((always_inline)) { return load_codes(unpacked[r] + 64 * h); });
      half(2 * blocks + h, codes);
    }
  }
  acc_sums(acc, tile.start, tile.out);
}

#ifdef HQQTENSOR_HAS_SPANS
template <int D>
void run_span_tile(Tile& tile, int64_t K, int64_t, const LaneScales&) {
  Acc acc[kGemvRows][1] = {};
  run_spans<D>(Spans::of(K), tile.rows, tile.x[0], &tile.scale[0][0], &acc[0][0],
               [&](int64_t byte) { tile.prefetch_rows<kSpanCodes / 2>(byte); });
  acc_sums(acc, tile.start, tile.out);
}
#endif

using RunTile = void (*)(Tile&, int64_t, int64_t, const LaneScales&);

template <int NB, int D, int DW, int T>
RunTile pick_scales(ScaleOf by) {
  if (by == ScaleOf::quads) return run_tile<NB, D, DW, T, ScaleOf::quads>;
  return by == ScaleOf::lanes ? run_tile<NB, D, DW, T, ScaleOf::lanes> : run_tile<NB, D, DW, T, ScaleOf::chunk>;
}

template <int NB, int D, int DW>
RunTile pick_shape(ScaleOf by, int64_t tokens) {
  if constexpr (kGemvTokens > 1)
    if (tokens > 1) return pick_scales<NB, D, DW, 2>(by);
  return pick_scales<NB, D, DW, 1>(by);
}

template <int NB, int D>
RunTile pick_digits(int table_digits, ScaleOf by, int64_t tokens) {
  if constexpr (NB <= 4) {  // tables of more than 16 entries have no digits
    if (table_digits == 1) return pick_shape<NB, D, 1>(by, tokens);
    if (table_digits > 1) return pick_shape<NB, D, D == 1 ? 2 : D>(by, tokens);
  }
  return pick_shape<NB, D, 0>(by, tokens);
}

RunTile pick_tile(const Weight& w, int digits, ScaleOf by, int64_t tokens) {
  RunTile found = nullptr;
#ifdef HQQTENSOR_HAS_SPANS
  static_assert(kGemvTokens == 1);
  if (spans_serve(w, digits)) return digits == 2 ? run_span_tile<2> : run_span_tile<3>;
#endif
  with_nbits(w.nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    found = digits == 1   ? pick_digits<NB, 1>(w.table.count, by, tokens)
            : digits == 2 ? pick_digits<NB, 2>(w.table.count, by, tokens)
                          : pick_digits<NB, 3>(w.table.count, by, tokens);
  });
  return found;
}

// Results of rows n, n + step, ... for token m.
inline void store(const Problem& p, int64_t m, int64_t n, int64_t step, int64_t rows, float* v) {
  const int64_t at = m * p.y_stride + n;
  if (p.bias)
    for (int64_t r = 0; r < rows; ++r) v[r] += p.bias[n + r * step];
  if (p.x_type == DType::f32) {
    for (int64_t r = 0; r < rows; ++r) ((float*)p.y)[at + r * step] = v[r];
    return;
  }
  uint16_t* y = (uint16_t*)p.y + at;
  uint16_t bits[kFloats];
  static_assert(kGemvRows < kFloats);
  store_half(bits, p.x_type, f_load_some(v, kGemvRows));
  // Of known length: the compiler makes a call of any other run of bytes, which takes longer than what it stores.
  if (step == 1 && rows == kGemvRows) return (void)__builtin_memcpy(y, bits, sizeof(uint16_t) * kGemvRows);
  for (int64_t r = 0; r < rows; ++r, y += step) {
    *y = bits[r];
    asm volatile("" : : : "memory");
  }
}

// Floats of one row's entries.
inline int64_t scales_per_row(const Weight& w, int64_t entries) {
  const int64_t most = padded(quad_rows(w) ? w.groups : (w.K + 63) / 64);
  return entries > most ? entries : most;
}

int64_t linear_rows_scratch(const Problem& p, int64_t entries) {
  return 2 * kGemvRows * padded(p.w.axis == 1 ? p.w.groups : 1) + kGemvRows * kGemvTokens * scales_per_row(p.w, entries) +
         Quads::bytes(p.w) / 4 + 64;
}

// How far apart the rows of a tile lie, of `count` to do. Those that are scaled by the same numbers (of Values::meta_rows)
// come together, since with one after the other these come from the second level of cache each time. Rows of a kilobyte and
// more are read faster as several streams (docs/performance.md).
inline int64_t rows_apart(const Weight& w, int64_t count) {
  constexpr int64_t most = 32;
  const int64_t own = w.scale.quantized() ? w.scale.meta_rows : 1, fit = count / kGemvRows < most ? count / kGemvRows : most;
  return kGemvRows > 2 && w.row_stride >= 1024 && fit > own ? fit / own * own : own;
}

void linear_rows(const Problem& p, const QuantizedActivations* digits, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  const QuantizedActivations& d = *digits;
  const int64_t width = padded(w.axis == 1 ? w.groups : 1), entries = scales_per_row(w, d.steps_per_row);
  const ScaleOf by = scale_of(w);
  const bool spans = spans_serve(w, d.count);
  const RowMeta meta{w,
                     d,
                     step_per_group(w) || spans,
                     !wide_serves(w, d) && pairs_serve(w, d) && codes_in_place(d.count, w.table.values != nullptr),
                     by == ScaleOf::quads && !spans,
                     code_unit(w, d.count),
                     scratch};
  float* both = scratch + 2 * kGemvRows * width;
  __builtin_memset(scratch, 0, sizeof(float) * (size_t)linear_rows_scratch(p, d.steps_per_row));
  const int64_t per_chunk = by == ScaleOf::lanes ? 64 / w.group_size : 1;
  const LaneScales lanes(by == ScaleOf::lanes ? w.group_size : 64);
  std::optional<Quads> quads;
  if (by == ScaleOf::quads && !spans) quads.emplace(w, pairs_serve(w, d), (char*)(both + kGemvRows * kGemvTokens * entries));
  const RunTile one = pick_tile(w, d.count, by, 1), several = pick_tile(w, d.count, by, kGemvTokens);
  Tile tile;
  tile.table = &w.table.digits[0][0];
  tile.quads = quads ? &*quads : nullptr;
  float* out[kGemvRows][kGemvTokens];
  for (int64_t i = 0; i < kGemvRows * kGemvTokens; ++i) out[i / kGemvTokens][i % kGemvTokens] = both + i * entries;
  // Bytes of a row's scales and zero points, which are fetched while the tile before is multiplied.
  const int64_t scale_bytes = w.axis == 1 ? w.scale.row_bytes() : 0;
  const int64_t zero_bytes = w.axis == 1 && w.zero.data ? w.zero.row_bytes() : 0;
  const auto run = [&](int64_t n, int64_t step, int64_t end, int64_t next, const QuantizedActivations& own) {
    tile.prefetch_distance = (next - n) * w.row_stride;
    tile.prefetch_from = step == 1 ? w.qdata + (next + kGemvRows) * w.row_stride : nullptr;
    int64_t rows = 0, numbers[kGemvRows];
    for (int64_t r = 0; r < kGemvRows; ++r) {  // a short last tile computes its first row again
      const bool there = n + r * step < end;
      numbers[r] = there ? n + r * step : n;
      tile.rows[r] = w.qdata + numbers[r] * w.row_stride;
      rows += there;
      if (next + r * step >= end) continue;
      for (int64_t i = 0; i < scale_bytes; i += 64) prefetch(w.scale.row(next + r * step) + i);
      for (int64_t i = 0; i < zero_bytes; i += 64) prefetch(w.zero.row(next + r * step) + i);
    }
    for (int64_t m = 0; m < p.M; m += kGemvTokens) {
      const int64_t tokens = p.M - m < kGemvTokens ? p.M - m : kGemvTokens;
      for (int64_t t = 0; t < kGemvTokens; ++t) {
        const int64_t token = t < tokens ? m + t : m;
        tile.x[t] = own.digits + token * own.chunks * own.count * 64;
        tile.step[t] = own.step + token * own.steps_per_row;
      }
      for (int64_t r = 0; r < kGemvRows; ++r)
        for (int64_t t = 0; t < kGemvTokens; ++t) {
          tile.scale[r][t] = w.axis == 0 ? own.step + (t < tokens ? m + t : m) * own.steps_per_row : out[r][t < tokens ? t : 0];
          tile.start[r][t] = f_zero();
        }
      if (w.axis == 1) meta.run(numbers, m, tokens, out, tile.start);
      (tokens > 1 ? several : one)(tile, w.K, per_chunk, lanes);
      for (int64_t t = 0; t < tokens; ++t) {
        if (w.axis == 0)
          for (float& v : tile.out[t]) v -= own.sum[m + t];
        store(p, m + t, n, step, rows, tile.out[t]);
      }
    }
  };
  if (w.axis == 1) {
    const int64_t apart = rows_apart(w, last - first);
    int64_t n = first;
    if (apart > 1)
      for (; n + kGemvRows * apart <= last; n += kGemvRows * apart)
        for (int64_t i = 0; i < apart; ++i) run(n + i, apart, last, i + 1 < apart ? n + i + 1 : n + kGemvRows * apart, d);
    for (; n < last; n += kGemvRows) run(n, 1, last, n + kGemvRows, d);
    return;
  }
  // A tile of rows of one group, then one of the next group: so each row follows one read before in memory.
  const int64_t below = kGemvRows * w.groups;
  for (int64_t n = 0; n < w.N; n += below)
    for (int64_t g = first; g < last && n + g < w.N; ++g)
      run(n + g, w.groups, w.N, g + 1 < last ? n + g + 1 : n + below < w.N ? n + below + first : last, digits[g - first]);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
