// y = x W^T for few rows of x: each packed row is read once and multiplied as integers.
//
// Activations come as integers of up to 24 bits in digits of 8 (`prepare`), so that a product of 64 codes with 64
// activations is three dot-product instructions instead of four conversions and four multiplications; a chunk is
// summed exactly and scaled once. The zero point leaves through the sums of x over each group:
//   sum_k (c_k - z) s x_k = s sum_k c_k x_k - s z sum_k x_k.
// Numbers of a table come as digits as well (struct Table), with its offset in the zero point's place.
#pragma once
#include "rows.h"

namespace {

struct Tile {
  const uint8_t* rows[kRows];
  const int8_t* x[kMaxTokens];
  const float* scale[kRows][kMaxTokens];
  Floats start[kRows][kMaxTokens];  // what the lanes of a result begin with
  const uint8_t* table;
  int64_t ahead;  // bytes to the same place in the next tile, fetched while this one is multiplied
  float out[kRows][kMaxTokens];
};

// group_shift: a scale serves 2^group_shift chunks. LANES: a chunk has 64 / group_size scales. DW: digits of a table.
template <int NB, int D, int DW, int T, bool LANES>
void run_tile(Tile& tile, int64_t K, int64_t group_size, int group_shift) {
  const int64_t blocks = K / 128, tail = K % 128;
  const int64_t per_chunk = LANES ? 64 / group_size : 1;
  const LaneScales lane_scales(LANES ? group_size : 4);
  Acc acc[kRows][T];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = acc_from(tile.start[r][t]);
  constexpr int W = DW ? DW : 1;
  auto half = [&](int64_t chunk, const Codes (*codes)[W]) __attribute__((always_inline)) {
    for (int t = 0; t < T; ++t) {
      const Tokens x = load_tokens<D>(tile.x[t] + chunk * D * 64);
      for (int r = 0; r < kRows; ++r) {
        const float* s = tile.scale[r][t] + (LANES ? chunk * per_chunk : chunk >> group_shift);
        if constexpr (LANES)
          add_chunk_lanes<NB, D, DW>(acc[r][t], codes[r], x, s, lane_scales);
        else
          add_chunk<NB, D, DW>(acc[r][t], codes[r], x, s);
      }
    }
  };
  auto numbers = [&](Codes c, Codes* out) __attribute__((always_inline)) {
    if constexpr (DW == 0)
      out[0] = c;
    else
      for (int i = 0; i < DW; ++i) out[i] = lookup(c, tile.table + 16 * i);
  };
  Codes codes[kRows][W];
  for (int64_t b = 0; b < blocks; ++b) {
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = tile.rows[r] + b * 16 * NB;
      prefetch(p + tile.ahead);
      if constexpr (NB > 4) prefetch(p + tile.ahead + 64);
      numbers(decode<NB, 0>(p), codes[r]);
    }
    half(2 * b, codes);
    for (int r = 0; r < kRows; ++r) numbers(decode<NB, 1>(tile.rows[r] + b * 16 * NB), codes[r]);
    half(2 * b + 1, codes);
  }
  if (tail) {
    uint8_t unpacked[kRows][128];
    for (int r = 0; r < kRows; ++r) unpack_tail(tile.rows[r] + blocks * 16 * NB, NB, (tail + 7) / 8 * 8, unpacked[r]);
    for (int h = 0; h < (tail > 64 ? 2 : 1); ++h) {
      for (int r = 0; r < kRows; ++r) numbers(load_codes(unpacked[r] + 64 * h), codes[r]);
      half(2 * blocks + h, codes);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < T; ++t) tile.out[r][t] = acc_sum(acc[r][t]);
}

using RunTile = void (*)(Tile&, int64_t, int64_t, int);

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

template <DType T>
inline Floats load_as(const void* p, int64_t i) {
  if constexpr (T == DType::f32) return f_load((const float*)p + i);
  if constexpr (T == DType::f16) return f_load_f16((const uint16_t*)p + i);
  return f_load_bf16((const uint16_t*)p + i);
}

// Scale and zero point of one row, for each of `tokens`: scale times step into out[t], and minus scale * zero * sum into
// the lanes of start[t], which the codes' products are then added to.
struct RowMeta {
  const Weight& w;
  const Digits& d;
  bool by_group;
  float unit;
  float *scale, *zero;  // scratch: values of a row, padded

  // Groups [first, last) out of values at s and z, whole vectors of them.
  template <DType T>
  __attribute__((always_inline)) void blocks(const void* s, const void* z, int64_t base, int64_t first, int64_t last,
                                             int64_t token, int64_t tokens, float* const* out, Floats* total) const {
    const bool table = w.table.values != nullptr;
    const Floats units = f_set(unit), offset = f_set(w.table.offset * w.table.unit);
    const int64_t width = padded(w.groups);
    for (int64_t g = first; g < last; g += kFloats) {
      Floats a = load_as<T>(s, g - base);
      const Floats product = f_mul(a, table ? offset : load_as<T>(z, g - base));
      if (table) a = f_mul(a, units);
      for (int64_t t = 0; t < tokens; ++t) {
        if (by_group) f_store(out[t] + g, f_mul(a, f_load(d.step + (token + t) * d.entries + g)));
        total[t] = f_fnma(product, f_load(d.sum + (token + t) * width + g), total[t]);
      }
    }
  }

  void run(int64_t row, int64_t token, int64_t tokens, float* const* out, Floats* start) const {
    for (int64_t t = 0; t < tokens; ++t) start[t] = f_zero();
    // Straight from memory where that is possible: the values of a row are used once for each token.
    const bool direct = w.scale.type != DType::u8 && (w.zero.data == nullptr || w.zero.type == w.scale.type);
    const int64_t whole = direct ? w.groups / kFloats * kFloats : 0;
    if (whole) {
      const void* s = at(w.scale.data, w.scale.type, row * w.scale.stride);
      const void* z = w.zero.data ? at(w.zero.data, w.zero.type, row * w.zero.stride) : s;
      if (w.scale.type == DType::f16)
        blocks<DType::f16>(s, z, 0, 0, whole, token, tokens, out, start);
      else if (w.scale.type == DType::bf16)
        blocks<DType::bf16>(s, z, 0, 0, whole, token, tokens, out, start);
      else
        blocks<DType::f32>(s, z, 0, 0, whole, token, tokens, out, start);
    }
    if (whole < w.groups) {
      const int64_t left = w.groups - whole;
      load_values(w.scale, row, whole, left, scale);
      if (w.zero.data) load_values(w.zero, row, whole, left, zero);
      for (int64_t i = left; i < padded(left); ++i) scale[i] = zero[i] = 0;
      blocks<DType::f32>(scale, zero, whole, whole, w.groups, token, tokens, out, start);
    }
    if (by_group) return;
    // A step for each chunk: a scale multiplies all those of its group.
    load_values(w.scale, row, 0, w.groups, scale);
    const int64_t per = w.groups == 1 ? d.chunks : w.group_size / 64;
    for (int64_t group = 0, c = 0; c < d.chunks; ++group) {
      const float v = scale[group] * unit;
      const int64_t first = c, end = c + per < d.chunks ? c + per : d.chunks;
      for (int64_t t = 0; t < tokens; ++t)
        for (c = first; c < end; ++c) out[t][c] = v * d.step[(token + t) * d.entries + c];
    }
  }

  // Scales and zero points of a row that comes soon.
  void fetch(int64_t row) const {
    const Values* both[] = {&w.scale, &w.zero};
    for (const Values* v : both) {
      if (!v->data) continue;
      const char* p = at(v->data, v->type, row * v->stride);
      for (int64_t i = 0; i < w.groups * hqqtensor::size_of(v->type); i += 64) prefetch(p + i);
    }
  }
};

int64_t linear_rows_scratch(const Problem& p, int64_t entries) {
  return 2 * padded(p.w.axis == 1 ? p.w.groups : 1) + kRows * kMaxTokens * entries + 64;
}

void linear_rows(const Problem& p, const Digits& d, int64_t first, int64_t last, int64_t step, float* scratch) {
  const Weight& w = p.w;
  const int64_t width = padded(w.axis == 1 ? w.groups : 1);
  const RowMeta meta{w, d, hqqtensor::step_per_group(w), code_unit(w, d.count), scratch, scratch + width};
  float* both = scratch + 2 * width;
  __builtin_memset(scratch, 0, sizeof(float) * (size_t)linear_rows_scratch(p, d.entries));
  const bool by_lane = w.axis == 1 && w.groups > 1 && w.group_size < 64;
  const int group_shift = meta.by_group && w.group_size == 128 ? 1 : 0;
  for (int64_t n = first; n < last; n += kRows * step) {
    Tile tile;
    // After the last tile of an axis-0 group come the rows of the next group.
    tile.ahead = (w.axis == 1 || n + kRows * step < last ? kRows * step : first + 1 - n) * w.row_stride;
    tile.table = &w.table.digits[0][0];
    int64_t rows = 0;
    for (int64_t r = 0; r < kRows; ++r) {  // a short last tile computes its first row again
      const bool there = n + r * step < last;
      tile.rows[r] = w.qdata + (there ? n + r * step : n) * w.row_stride;
      rows += there;
      if (w.axis == 1 && n + (kRows + r) * step < last) meta.fetch(n + (kRows + r) * step);
    }
    for (int64_t m = 0; m < p.M; m += kMaxTokens) {
      const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
      for (int64_t t = 0; t < kMaxTokens; ++t) tile.x[t] = d.digits + (t < tokens ? m + t : m) * d.chunks * d.count * 64;
      for (int64_t r = 0; r < kRows; ++r) {
        float* out[kMaxTokens];
        for (int64_t t = 0; t < kMaxTokens; ++t) {
          out[t] = both + (r * kMaxTokens + t) * d.entries;
          tile.scale[r][t] = w.axis == 0 ? d.step + (t < tokens ? m + t : m) * d.entries : out[t < tokens ? t : 0];
          tile.start[r][t] = f_zero();
        }
        if (w.axis == 1 && r < rows) meta.run(n + r * step, m, tokens, out, tile.start[r]);
      }
      pick_tile(w, d.count, by_lane, tokens)(tile, w.K, w.group_size, group_shift);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r)
          store(p, m + t, n + r * step, w.axis == 0 ? tile.out[r][t] - d.sum[m + t] : tile.out[r][t]);
    }
  }
}

}  // namespace
