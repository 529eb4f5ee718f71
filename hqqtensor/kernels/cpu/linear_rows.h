// y = x W^T for few rows of x: each packed row is read once and multiplied as integers.
//
// Activations come as integers of up to 24 bits in digits of 8 (`prepare`), so that a product of 64 codes with 64
// activations is three dot-product instructions instead of four conversions and four multiplications; a chunk is
// summed exactly and scaled once. The zero point leaves through the sums of x over each group:
//   sum_k (c_k - z) s x_k = s sum_k c_k x_k - s z sum_k x_k.
// Numbers of a table come as digits as well (struct Table), with its offset in the zero point's place.
#pragma once
#include "activations.h"

namespace {

struct Tile {
  const uint8_t* rows[kRows];
  const int8_t* x[kMaxTokens];
  const float* scale[kRows][kMaxTokens];
  Floats start[kRows][kMaxTokens];  // what is added to the lanes of a result
  const uint8_t* table;
  const uint8_t* lines;  // where rows follow one another: the tile after the next, fetched while this one is multiplied
  int64_t ahead;         // else bytes to the same place in the next tile
  float out[kRows][kMaxTokens];
};

// LANES: a chunk has 64 / group_size scales, else one. DW: digits of a table.
template <int NB, int D, int DW, int T, bool LANES>
void run_tile(Tile& tile, int64_t K, int64_t per_chunk, const LaneScales& lanes) {
  const int64_t blocks = K / 128, tail = K % 128;
  Acc acc[kRows][T] = {};
  constexpr int W = DW ? DW : 1;
  const auto half = [&](int64_t chunk, const Codes (*codes)[2 * W]) __attribute__((always_inline)) {
    for (int t = 0; t < T; ++t) {
      const Tokens x = load_tokens<D>(tile.x[t] + chunk * D * 64);
      for (int r = 0; r < kRows; ++r) {
        const float* s = tile.scale[r][t] + (LANES ? chunk * per_chunk : chunk);
        if constexpr (LANES)
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
  const auto fetch = [&](int64_t b) __attribute__((always_inline)) {
    if (tile.lines) {
      for (int i = 0; i < kRows * NB / 4; ++i) prefetch(tile.lines + (b * (kRows * NB / 4) + i) * 64);
    } else if (NB >= 4 || (b * 16 * NB & 63) < 16 * NB) {  // once for each line
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < NB; i += 4) prefetch(tile.rows[r] + b * 16 * NB + tile.ahead + 16 * i);
    }
  };
  constexpr bool wide = Wide<NB>::serve && DW == 0 && !LANES, pairs = Pairs<NB>::serve && !wide;
  int64_t done = 0;
  if constexpr (wide) {
    done = blocks / Wide<NB>::blocks * Wide<NB>::blocks;
    Wide<NB>::template run<D>(tile.rows, tile.x[0], &tile.scale[0][0], done, &acc[0][0], fetch);
  }
  Codes codes[kRows][2 * W];
  for (int64_t b = done; b < blocks; ++b) {
    fetch(b);
    if constexpr (pairs) {
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* p = tile.rows[r] + b * 16 * NB;
        Codes first, second;
        Pairs<NB>::template decode<codes_in_place(D, DW > 0)>(p, first, second);
        numbers(first, codes[r]);
        numbers(second, codes[r] + W);
      }
      for (int t = 0; t < T; ++t) {
        const int8_t* at = tile.x[t] + b * D * 128;
        const Tokens x[2] = {load_tokens<D>(at), load_tokens<D>(at + D * 64)};
        for (int r = 0; r < kRows; ++r) {
          const typename Pairs<NB>::Sums sum = Pairs<NB>::template dot<D, DW>(codes[r], x);
          const float* s = tile.scale[r][t] + (LANES ? 2 * b * per_chunk : 2 * b);
          if constexpr (LANES)
            Pairs<NB>::add_lanes(acc[r][t], sum, s, lanes);
          else
            Pairs<NB>::add(acc[r][t], sum, s);
        }
      }
    } else {
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* p = tile.rows[r] + b * 16 * NB;
        numbers(decode<NB, 0>(p), codes[r]);
      }
      half(2 * b, codes);
      for (int r = 0; r < kRows; ++r) numbers(decode<NB, 1>(tile.rows[r] + b * 16 * NB), codes[r]);
      half(2 * b + 1, codes);
    }
  }
  if constexpr (pairs && codes_in_place(D, DW > 0))
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < T; ++t) Pairs<NB>::finish(acc[r][t]);
  if (tail) {
    uint8_t unpacked[kRows][128];
    for (int r = 0; r < kRows; ++r) unpack_tail(tile.rows[r] + blocks * 16 * NB, NB, (tail + 7) / 8 * 8, unpacked[r]);
    for (int h = 0; h < (tail > 64 ? 2 : 1); ++h) {
      for (int r = 0; r < kRows; ++r) numbers(load_codes(unpacked[r] + 64 * h), codes[r]);
      half(2 * blocks + h, codes);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < T; ++t) tile.out[r][t] = acc_sum(acc[r][t], tile.start[r][t]);
}

using RunTile = void (*)(Tile&, int64_t, int64_t, const LaneScales&);

template <int NB, int D, int DW>
RunTile pick_shape(bool by_lane, int64_t tokens) {
  if constexpr (kMaxTokens > 1)
    if (tokens > 1) return by_lane ? run_tile<NB, D, DW, 2, true> : run_tile<NB, D, DW, 2, false>;
  return by_lane ? run_tile<NB, D, DW, 1, true> : run_tile<NB, D, DW, 1, false>;
}

template <int NB, int D>
RunTile pick_digits(int table_digits, bool by_lane, int64_t tokens) {
  if constexpr (NB <= 4) {  // tables of more than 16 entries have no digits
    if (table_digits == 1) return pick_shape<NB, D, 1>(by_lane, tokens);
    if (table_digits > 1) return pick_shape<NB, D, D == 1 ? 2 : D>(by_lane, tokens);
  }
  return pick_shape<NB, D, 0>(by_lane, tokens);
}

RunTile pick_tile(const Weight& w, int digits, bool by_lane, int64_t tokens) {
  RunTile found = nullptr;
  with_nbits(w.nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    found = digits == 1   ? pick_digits<NB, 1>(w.table.count, by_lane, tokens)
            : digits == 2 ? pick_digits<NB, 2>(w.table.count, by_lane, tokens)
                          : pick_digits<NB, 3>(w.table.count, by_lane, tokens);
  });
  return found;
}

inline void store(const Problem& p, int64_t m, int64_t n, float v) {
  if (p.bias) v += p.bias[n];
  const int64_t i = m * p.y_stride + n;
  if (p.x_type == DType::f32)
    ((float*)p.y)[i] = v;
  else
    from_float(&v, 1, p.x_type, (uint16_t*)p.y + i);
}

// Scales and zero points of the rows of a tile, for each of `tokens`: scale times step into out[r][t], an entry for each
// chunk (for each group where a chunk has several), and minus scale * zero * sum into the lanes of start[r][t].
struct RowMeta {
  const Weight& w;
  const Digits& d;
  bool by_group, in_place;
  float unit;
  float* scratch;  // 2 kRows rows of values, padded with zeros

  using Out = float* [kMaxTokens];
  using Start = Floats[kMaxTokens];

  // Groups [first, last), whole vectors of them, whose values lie at s[r] and z[r].
  template <DType T, bool TABLE>
  __attribute__((always_inline)) void blocks(const char* const* s, const char* const* z, int64_t first, int64_t last,
                                             int64_t token, int64_t tokens, Out* out, Start* start) const {
    const Floats units = f_set(unit), offset = f_set(w.table.offset * w.table.unit);
    const int64_t width = padded(w.groups);
    for (int64_t t = 0; t < tokens; ++t) {
      const float *step = d.step + (token + t) * d.entries, *sums = d.sum + (token + t) * width;
      Floats total[kRows];
      for (int r = 0; r < kRows; ++r) total[r] = start[r][t];
      for (int64_t g = first; g < last; g += kFloats)
        for (int r = 0; r < kRows; ++r) {
          const Floats a = load_as<T>(s[r], g - first);
          const Floats product = f_mul(a, TABLE ? offset : load_as<T>(z[r], g - first));
          if (by_group) f_store(out[r][t] + g, f_mul(TABLE ? f_mul(a, units) : a, f_load(step + g)));
          total[r] = f_fnma(product, f_load(sums + g), total[r]);
        }
      for (int r = 0; r < kRows; ++r) start[r][t] = total[r];
    }
  }
  template <DType T>
  void blocks(const char* const* s, const char* const* z, int64_t first, int64_t last, int64_t token, int64_t tokens,
              Out* out, Start* start) const {
    if (w.table.values)
      blocks<T, true>(s, z, first, last, token, tokens, out, start);
    else
      blocks<T, false>(s, z, first, last, token, tokens, out, start);
  }
  // Straight from memory: the values of a row are used once for each token.
  template <DType T>
  void direct(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    const int64_t whole = w.groups / kFloats * kFloats, size = hqqtensor::size_of(T), left = (w.groups - whole) * size;
    const char *s[kRows], *z[kRows];
    for (int r = 0; r < kRows; ++r) {
      s[r] = w.scale.row(rows[r]);
      z[r] = w.zero.data ? w.zero.row(rows[r]) : s[r];
    }
    blocks<T>(s, z, 0, whole, token, tokens, out, start);
    if (left == 0) return;
    char last[kRows][2][4 * kFloats] = {};  // what lies behind a row may not be read
    for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(last[r][0], s[r] + whole * size, (size_t)left);
      __builtin_memcpy(last[r][1], z[r] + whole * size, (size_t)left);
      s[r] = last[r][0];
      z[r] = last[r][1];
    }
    blocks<T>(s, z, whole, w.groups, token, tokens, out, start);
  }

  void run(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    for (int r = 0; r < kRows; ++r)
      for (int64_t t = 0; t < tokens; ++t) start[r][t] = f_zero();
    if (w.scale.quantized() || (w.zero.data && w.zero.type != w.scale.type)) {
      const char *s[kRows], *z[kRows];
      for (int r = 0; r < kRows; ++r) {
        float *scale = scratch + 2 * r * padded(w.groups), *zero = scale + padded(w.groups);
        load_values(w.scale, rows[r], 0, w.groups, scale);
        if (w.zero.data) load_values(w.zero, rows[r], 0, w.groups, zero);
        s[r] = (const char*)scale;
        z[r] = (const char*)zero;
      }
      blocks<DType::f32>(s, z, 0, w.groups, token, tokens, out, start);
    } else if (w.scale.type == DType::f16) {
      direct<DType::f16>(rows, token, tokens, out, start);
    } else if (w.scale.type == DType::bf16) {
      direct<DType::bf16>(rows, token, tokens, out, start);
    } else {
      direct<DType::f32>(rows, token, tokens, out, start);
    }
    if (by_group && w.group_size <= 64) return;
    for (int r = 0; r < kRows; ++r) {
      if (by_group)
        for (int64_t t = 0; t < tokens; ++t) halve(out[r][t]);
      else
        spread_scales(rows[r], token, tokens, out[r]);
    }
  }

  // One step for two chunks: both get it, from the back as they lie in the same place.
  void halve(float* out) const {
    const Floats second = f_set(in_place ? 1.0f / 16 : 1);
    for (int64_t g = (w.groups - 1) / kFloats * kFloats; g >= 0; g -= kFloats) {
      const Floats v = f_load(out + g);
      f_store_pairs(out + 2 * g, v, f_mul(v, second));
    }
    const int64_t odd = w.K / 128 * 2 + 1;  // a second chunk outside whole blocks
    if (odd < d.chunks) out[odd] = out[odd - 1];
  }
  // A step for each chunk. Vectors run on into the next group, which comes after.
  void spread_scales(int64_t row, int64_t token, int64_t tokens, float* const* out) const {
    const int64_t per = w.groups == 1 ? d.chunks : w.group_size / 64;
    load_values(w.scale, row, 0, w.groups, scratch);
    for (int64_t group = 0; group < w.groups; ++group) {
      const Floats v = f_set(scratch[group] * unit);
      const int64_t first = group * per, end = first + per < d.chunks ? first + per : d.chunks;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = first; c < end; c += kFloats)
          f_store(out[t] + c, f_mul(v, f_load(d.step + (token + t) * d.entries + c)));
    }
  }
};

// Floats of one row's entries.
inline int64_t row_entries(const Weight& w, int64_t entries) {
  const int64_t chunks = padded((w.K + 63) / 64);
  return entries > chunks ? entries : chunks;
}

int64_t linear_rows_scratch(const Problem& p, int64_t entries) {
  return 2 * kRows * padded(p.w.axis == 1 ? p.w.groups : 1) + kRows * kMaxTokens * row_entries(p.w, entries) + 64;
}

void linear_rows(const Problem& p, const Digits* digits, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  const Digits& d = *digits;
  const int64_t width = padded(w.axis == 1 ? w.groups : 1), entries = row_entries(w, d.entries);
  const RowMeta meta{w,
                     d,
                     hqqtensor::step_per_group(w),
                     !wide_serves(w, d) && pairs_serve(w, d) && codes_in_place(d.count, w.table.values != nullptr),
                     code_unit(w, d.count),
                     scratch};
  float* both = scratch + 2 * kRows * width;
  __builtin_memset(scratch, 0, sizeof(float) * (size_t)linear_rows_scratch(p, d.entries));
  const bool by_lane = scales_by_lane(w);
  const int64_t per_chunk = by_lane ? 64 / w.group_size : 1;
  const LaneScales lanes(by_lane ? w.group_size : 64);
  const RunTile one = pick_tile(w, d.count, by_lane, 1), several = pick_tile(w, d.count, by_lane, kMaxTokens);
  Tile tile;
  tile.table = &w.table.digits[0][0];
  const auto run = [&](int64_t n, int64_t step, int64_t end, int64_t next, const Digits& own) {
    tile.ahead = (next - n) * w.row_stride;
    tile.lines = step == 1 ? w.qdata + next * w.row_stride : nullptr;
    int64_t rows = 0, numbers[kRows];
    for (int64_t r = 0; r < kRows; ++r) {  // a short last tile computes its first row again
      const bool there = n + r * step < end;
      numbers[r] = there ? n + r * step : n;
      tile.rows[r] = w.qdata + numbers[r] * w.row_stride;
      rows += there;
      if (w.axis == 1 && n + kRows + r < end) {  // what comes soon
        fetch_values(w.scale, n + kRows + r);
        fetch_values(w.zero, n + kRows + r);
      }
    }
    for (int64_t m = 0; m < p.M; m += kMaxTokens) {
      const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
      for (int64_t t = 0; t < kMaxTokens; ++t)
        tile.x[t] = own.digits + (t < tokens ? m + t : m) * own.chunks * own.count * 64;
      float* out[kRows][kMaxTokens];
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t t = 0; t < kMaxTokens; ++t) {
          out[r][t] = both + (r * kMaxTokens + t) * entries;
          tile.scale[r][t] = w.axis == 0 ? own.step + (t < tokens ? m + t : m) * own.entries : out[r][t < tokens ? t : 0];
          tile.start[r][t] = f_zero();
        }
      if (w.axis == 1) meta.run(numbers, m, tokens, out, tile.start);
      (tokens > 1 ? several : one)(tile, w.K, per_chunk, lanes);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
          store(p, m + t, n + r * step, w.axis == 0 ? tile.out[r][t] - own.sum[m + t] : tile.out[r][t]);
    }
  };
  if (w.axis == 1) {
    for (int64_t n = first; n < last; n += kRows) run(n, 1, last, n + 2 * kRows, d);
    return;
  }
  // A tile of rows of one group, then one of the next group: so each row follows one read before in memory.
  for (int64_t n = 0; n < w.N; n += kRows * w.groups)
    for (int64_t g = first; g < last && n + g < w.N; ++g)
      run(n + g, w.groups, w.N, g + 1 < last ? n + g + 1 : n + kRows * w.groups + first, digits[g - first]);
}

}  // namespace
