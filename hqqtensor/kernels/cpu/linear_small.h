// y = x W^T for few rows of x: each packed row is read once and multiplied as integers.
//
// Activations come as integers of up to 24 bits in digits of 8 (`prepare`), so that a product of 64 codes with 64
// activations is three dot-product instructions instead of four conversions and four multiplications; a chunk is
// summed exactly and scaled once. The zero point leaves through the sums of x over each group:
//   sum_k (c_k - z) s x_k = s sum_k c_k x_k - s z sum_k x_k.
#pragma once
#include "rows.h"

namespace {

struct Tile {
  const uint8_t* rows[kRows];
  const int8_t* x[kMaxTokens];
  const float* scale[kRows][kMaxTokens];
  Floats start[kRows][kMaxTokens];  // what the lanes of a result begin with
  int64_t ahead;  // bytes to the same place in the next tile, fetched while this one is multiplied
  float out[kRows][kMaxTokens];
};

// group_shift: a scale serves 2^group_shift chunks. LANES: a chunk has 64 / group_size scales.
template <int NB, int D, int T, bool LANES>
void run_tile(Tile& tile, int64_t K, int64_t group_size, int group_shift) {
  const int64_t blocks = K / 128, tail = K % 128;
  const int64_t per_chunk = LANES ? 64 / group_size : 1;
  const LaneScales lane_scales(LANES ? group_size : 4);
  Acc acc[kRows][T];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = acc_from(tile.start[r][t]);
  auto half = [&](int64_t chunk, const Codes* codes) __attribute__((always_inline)) {
    for (int t = 0; t < T; ++t) {
      const Tokens x = load_tokens<D>(tile.x[t] + chunk * D * 64);
      for (int r = 0; r < kRows; ++r) {
        const float* s = tile.scale[r][t] + (LANES ? chunk * per_chunk : chunk >> group_shift);
        if constexpr (LANES)
          add_chunk_lanes<NB, D>(acc[r][t], codes[r], x, s, lane_scales);
        else
          add_chunk<NB, D>(acc[r][t], codes[r], x, s);
      }
    }
  };
  for (int64_t b = 0; b < blocks; ++b) {
    Codes codes[kRows];
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = tile.rows[r] + b * 16 * NB;
      prefetch(p + tile.ahead);
      if constexpr (NB > 4) prefetch(p + tile.ahead + 64);
      codes[r] = decode<NB, 0>(p);
    }
    half(2 * b, codes);
    for (int r = 0; r < kRows; ++r) codes[r] = decode<NB, 1>(tile.rows[r] + b * 16 * NB);
    half(2 * b + 1, codes);
  }
  if (tail) {
    uint8_t unpacked[kRows][128];
    Codes codes[kRows];
    for (int r = 0; r < kRows; ++r) unpack_tail(tile.rows[r] + blocks * 16 * NB, NB, (tail + 7) / 8 * 8, unpacked[r]);
    for (int h = 0; h < (tail > 64 ? 2 : 1); ++h) {
      for (int r = 0; r < kRows; ++r) codes[r] = load_codes(unpacked[r] + 64 * h);
      half(2 * blocks + h, codes);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < T; ++t) tile.out[r][t] = acc_sum(acc[r][t]);
}

using RunTile = void (*)(Tile&, int64_t, int64_t, int);

template <int NB, int D, bool LANES>
RunTile pick_tokens(int64_t tokens) {
  if constexpr (kMaxTokens >= 4)
    if (tokens > 2) return run_tile<NB, D, 4, LANES>;
  return tokens > 1 ? run_tile<NB, D, 2, LANES> : run_tile<NB, D, 1, LANES>;
}

RunTile pick_tile(int nbits, int digits, bool lanes_, int64_t tokens) {
  RunTile found = nullptr;
  with_nbits(nbits, [&](auto nb) {
    constexpr int NB = nb.value;
    if (digits == 1)
      found = lanes_ ? pick_tokens<NB, 1, true>(tokens) : pick_tokens<NB, 1, false>(tokens);
    else if (digits == 2)
      found = lanes_ ? pick_tokens<NB, 2, true>(tokens) : pick_tokens<NB, 2, false>(tokens);
    else
      found = lanes_ ? pick_tokens<NB, 3, true>(tokens) : pick_tokens<NB, 3, false>(tokens);
  });
  return found;
}

inline void store(const Problem& p, int64_t m, int64_t n, float v) {
  if (p.bias) v += p.bias[n];
  const int64_t i = m * p.w.N + n;
  if (p.x_type == DType::f32)
    ((float*)p.y)[i] = v;
  else
    from_float(&v, 1, p.x_type, (uint16_t*)p.y + i);
}

using hqqtensor::padded;

inline Floats load_meta(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return f_load((const float*)p + i);
  return type == DType::f16 ? f_load_f16((const uint16_t*)p + i) : f_load_bf16((const uint16_t*)p + i);
}

// Scale and zero point of one row, for each of `tokens`: scale times step into out[t], and minus scale * zero * sum into
// the lanes of start[t], which the codes' products are then added to.
struct RowMeta {
  const Weight& w;
  const Digits& d;
  bool by_group;
  float *scale, *zero;  // scratch: a row's last groups, padded

  void run(int64_t row, int64_t token, int64_t tokens, float* const* out, Floats* start) const {
    const char *s = at(w.scale, w.meta, row * w.meta_stride), *z = at(w.zero, w.meta, row * w.meta_stride);
    const int64_t size = w.meta == DType::f32 ? 4 : 2, whole = w.groups / kFloats * kFloats;
    const float *step = d.step + token * d.entries, *sums = d.sum + token * padded(w.groups);
    Floats total[kMaxTokens];
    for (int64_t t = 0; t < tokens; ++t) total[t] = f_zero();
    auto block = [&](Floats a, Floats b, int64_t g) {
      const Floats product = f_mul(a, f_sub(f_zero(), b));
      for (int64_t t = 0; t < tokens; ++t) {
        if (by_group) f_store(out[t] + g, f_mul(a, f_load(step + t * d.entries + g)));
        total[t] = f_fma(product, f_load(sums + t * padded(w.groups) + g), total[t]);
      }
    };
    for (int64_t g = 0; g < whole; g += kFloats) block(load_meta(s, w.meta, g), load_meta(z, w.meta, g), g);
    if (whole < w.groups) {
      to_float(s + whole * size, w.meta, w.groups - whole, scale);
      to_float(z + whole * size, w.meta, w.groups - whole, zero);
      block(f_load(scale), f_load(zero), whole);
    }
    for (int64_t t = 0; t < tokens; ++t) start[t] = total[t];
    if (by_group) return;
    // A step for each chunk: a scale multiplies all those of its group.
    const int64_t per = w.groups == 1 ? d.chunks : w.group_size / 64;
    for (int64_t g = 0, c = 0; c < d.chunks; ++g) {
      float v;
      to_float(s + g * size, w.meta, 1, &v);
      const int64_t first = c, end = c + per < d.chunks ? c + per : d.chunks;
      for (int64_t t = 0; t < tokens; ++t)
        for (c = first; c < end; ++c) out[t][c] = v * step[t * d.entries + c];
    }
  }
};

int64_t linear_small_scratch(const Problem& p) {
  return 2 * kFloats + kRows * kMaxTokens * hqqtensor::step_entries(p.w) + 64;
}

void linear_small(const Problem& p, const Digits& d, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  const RowMeta meta{w, d, hqqtensor::step_per_group(w), scratch, scratch + kFloats};
  float* both = scratch + 2 * kFloats;
  __builtin_memset(scratch, 0, sizeof(float) * (size_t)linear_small_scratch(p));
  const bool by_lane = w.groups > 1 && w.group_size < 64;
  const int group_shift = meta.by_group && w.group_size == 128 ? 1 : 0;
  for (int64_t n = first; n < last; n += kRows) {
    Tile tile;
    tile.ahead = kRows * w.row_stride;
    const int64_t rows = last - n < kRows ? last - n : kRows;
    for (int64_t r = 0; r < kRows; ++r)  // a short last tile computes its first row again
      tile.rows[r] = w.qdata + (r < rows ? n + r : n) * w.row_stride;
    for (int64_t m = 0; m < p.M; m += kMaxTokens) {
      const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
      for (int64_t r = 0; r < kRows; ++r) {
        float* out[kMaxTokens];
        for (int64_t t = 0; t < kMaxTokens; ++t) {
          tile.x[t] = d.digits + (t < tokens ? m + t : m) * d.chunks * d.count * 64;
          out[t] = both + (r * kMaxTokens + t) * d.entries;
          tile.scale[r][t] = out[t < tokens ? t : 0];
          tile.start[r][t] = f_zero();
        }
        if (r < rows) meta.run(n + r, m, tokens, out, tile.start[r]);
      }
      pick_tile(w.nbits, d.count, by_lane, tokens)(tile, w.K, w.group_size, group_shift);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) store(p, m + t, n + r, tile.out[r][t]);
    }
  }
}

int64_t linear_small_axis0_scratch(const Problem& p, int digits) {
  const int64_t chunks = (p.w.K + 63) / 64;
  return 4 * (3 * padded(p.w.K) + p.M) + p.M * (4 * hqqtensor::step_entries(p.w) + chunks * digits * 64) + 256;
}

void linear_small_axis0(const Problem& p, int digits, int64_t first, int64_t last, char* scratch) {
  const Weight& w = p.w;
  const int64_t K = w.K, wide = padded(K), chunks = (K + 63) / 64;
  Digits d{(int8_t*)scratch, nullptr, nullptr, chunks, hqqtensor::step_entries(w), digits};
  d.step = (float*)(scratch + p.M * chunks * digits * 64);
  float *scale = d.step + p.M * d.entries, *zero = scale + wide, *x = zero + wide, *shift = x + wide;
  for (int64_t g = first; g < last; ++g) {
    to_float(at(w.scale, w.meta, g * w.meta_stride), w.meta, K, scale);
    to_float(at(w.zero, w.meta, g * w.meta_stride), w.meta, K, zero);
    bool whole = true;
    for (int64_t m = 0; m < p.M; ++m) {
      to_float(at(p.x, p.x_type, m * p.x_stride), p.x_type, K, x);
      double s = 0;
      for (int64_t k = 0; k < K; ++k) {
        x[k] *= p.pre_scale ? scale[k] * p.pre_scale[k] : scale[k];
        s += x[k] * zero[k];
      }
      shift[m] = (float)s;
      whole = whole && prepare(x, w, m, d);
    }
    for (int64_t n = g; n < w.N; n += w.groups * kRows) {
      if (!whole) {  // activations that no integers stand for: this group in plain floats
        for (int64_t r = 0; r < kRows && n + r * w.groups < w.N; ++r) {
          dequantize_row(w, n + r * w.groups, scale);
          for (int64_t m = 0; m < p.M; ++m) {
            to_float(at(p.x, p.x_type, m * p.x_stride), p.x_type, K, x);
            double s = 0;
            for (int64_t k = 0; k < K; ++k) s += x[k] * (p.pre_scale ? scale[k] * p.pre_scale[k] : scale[k]);
            store(p, m, n + r * w.groups, (float)s);
          }
        }
        continue;
      }
      Tile tile;
      tile.ahead = kRows * w.groups * w.row_stride;
      for (auto& row : tile.start)
        for (auto& v : row) v = f_zero();
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = n + r * w.groups < w.N ? n + r * w.groups : n;
        tile.rows[r] = w.qdata + row * w.row_stride;
      }
      for (int64_t m = 0; m < p.M; m += kMaxTokens) {
        const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
        for (int64_t t = 0; t < kMaxTokens; ++t) {
          const int64_t token = t < tokens ? m + t : m;
          tile.x[t] = d.digits + token * chunks * digits * 64;
          for (int64_t r = 0; r < kRows; ++r) tile.scale[r][t] = d.step + token * d.entries;
        }
        pick_tile(w.nbits, digits, false, tokens)(tile, K, 64, 0);
        for (int64_t r = 0; r < kRows && n + r * w.groups < w.N; ++r)
          for (int64_t t = 0; t < tokens; ++t) store(p, m + t, n + r * w.groups, tile.out[r][t] - shift[m + t]);
      }
    }
  }
}

}  // namespace
