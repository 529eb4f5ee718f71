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
  int64_t ahead;  // bytes to the same place in the next tile, fetched while this one is multiplied
  float out[kRows][kMaxTokens];
};

template <int NB, int D, int T, bool LANES>
void run_tile(Tile& tile, int64_t K, int64_t group_size) {
  const int64_t blocks = K / 128, tail = K % 128;
  const int64_t per_chunk = LANES ? 64 / group_size : 1;
  const LaneScales lane_scales(LANES ? group_size : 4);
  Acc acc[kRows][T];
  for (auto& row : acc)
    for (auto& a : row) a = acc_zero();
  auto half = [&](int64_t chunk, const Codes* codes) __attribute__((always_inline)) {
    for (int t = 0; t < T; ++t) {
      const Tokens x = load_tokens<D>(tile.x[t] + chunk * D * 64);
      for (int r = 0; r < kRows; ++r) {
        const float* s = tile.scale[r][t] + chunk * per_chunk;
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

using RunTile = void (*)(Tile&, int64_t, int64_t);

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

inline int64_t padded(int64_t count) { return (count + 31) / 16 * 16; }

// scale of each chunk (or of each group within it) times the activations' step there.
inline void combine(const float* scale, const float* step, int64_t chunks, const Weight& w, float* out) {
  if (w.axis == 1 && w.groups > 1 && w.group_size < 64) {
    const int64_t per = 64 / w.group_size;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = 0; i < per; ++i) out[c * per + i] = c * per + i < w.groups ? scale[c * per + i] * step[c] : 0;
  } else if (w.groups == w.K / 64 && w.K % 64 == 0 && w.group_size == 64) {
    int64_t c = 0;
    for (; c + kFloats <= chunks; c += kFloats) f_store(out + c, f_mul(f_load(scale + c), f_load(step + c)));
    for (; c < chunks; ++c) out[c] = scale[c] * step[c];
  } else {
    const int64_t per = w.groups == 1 ? chunks : w.group_size / 64;
    for (int64_t g = 0, c = 0; c < chunks; ++g)
      for (const int64_t end = c + per < chunks ? c + per : chunks; c < end; ++c) out[c] = scale[g] * step[c];
  }
}

// Sums of x over each group, from those of each 4.
inline void group_sums(const Digits& d, int64_t m, const Weight& w, float* out) {
  const float* sums = d.sum + m * d.chunks * 16;
  const int64_t quads = d.chunks * 16, per = w.groups == 1 ? quads : w.group_size / 4;
  for (int64_t g = 0; g < w.groups; ++g) {
    double s = 0;
    const int64_t end = (g + 1) * per < quads ? (g + 1) * per : quads;
    for (int64_t i = g * per; i < end; ++i) s += sums[i];
    out[g] = (float)s;
  }
  for (int64_t g = w.groups; g < padded(w.groups); ++g) out[g] = 0;
}

int64_t linear_small_scratch(const Problem& p) {
  const int64_t chunks = (p.w.K + 63) / 64, entries = padded(p.w.groups > chunks ? p.w.groups + 64 : chunks);
  return padded(p.w.groups) * (2 * kRows + p.M) + kRows * kMaxTokens * entries;
}

void linear_small(const Problem& p, const Digits& d, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  const int64_t groups = padded(w.groups);
  const int64_t entries = padded(w.groups > d.chunks ? w.groups + 64 : d.chunks);
  float *scale = scratch, *zero = scale + kRows * groups, *sums = zero + kRows * groups, *both = sums + p.M * groups;
  __builtin_memset(scale, 0, sizeof(float) * 2 * kRows * groups);
  for (int64_t m = 0; m < p.M; ++m) group_sums(d, m, w, sums + m * groups);
  const bool by_lane = w.groups > 1 && w.group_size < 64;
  for (int64_t n = first; n < last; n += kRows) {
    Tile tile;
    tile.ahead = kRows * w.row_stride;
    const int64_t rows = last - n < kRows ? last - n : kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = r < rows ? n + r : n;  // a short last tile computes its first row again
      tile.rows[r] = w.qdata + row * w.row_stride;
      to_float(at(w.scale, w.meta, row * w.meta_stride), w.meta, w.groups, scale + r * groups);
      to_float(at(w.zero, w.meta, row * w.meta_stride), w.meta, w.groups, zero + r * groups);
      float* product = zero + r * groups;
      for (int64_t g = 0; g < groups; g += kFloats)
        f_store(product + g, f_mul(f_load(product + g), f_load(scale + r * groups + g)));
    }
    for (int64_t m = 0; m < p.M; m += kMaxTokens) {
      const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
      for (int64_t t = 0; t < kMaxTokens; ++t) {
        const int64_t token = t < tokens ? m + t : m;
        tile.x[t] = d.digits + token * d.chunks * d.count * 64;
        for (int64_t r = 0; r < kRows; ++r) {
          float* out = both + (r * kMaxTokens + t) * entries;
          tile.scale[r][t] = out;
          if (t < tokens) combine(scale + r * groups, d.step + token * d.chunks, d.chunks, w, out);
          if (t >= tokens) tile.scale[r][t] = both + r * kMaxTokens * entries;
        }
      }
      pick_tile(w.nbits, d.count, by_lane, tokens)(tile, w.K, w.group_size);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) {
          Floats shift = f_zero();
          for (int64_t g = 0; g < groups; g += kFloats)
            shift = f_fma(f_load(zero + r * groups + g), f_load(sums + (m + t) * groups + g), shift);
          store(p, m + t, n + r, tile.out[r][t] - f_sum(shift));
        }
    }
  }
}

int64_t linear_small_axis0_scratch(const Problem& p, int digits) {
  const int64_t chunks = (p.w.K + 63) / 64;
  return 4 * (3 * padded(p.w.K) + p.M) + p.M * (chunks * (4 + 64) + chunks * digits * 64) + 256;
}

void linear_small_axis0(const Problem& p, int digits, int64_t first, int64_t last, char* scratch) {
  const Weight& w = p.w;
  const int64_t K = w.K, wide = padded(K), chunks = (K + 63) / 64;
  Digits d{(int8_t*)scratch, nullptr, nullptr, chunks, digits};
  d.step = (float*)(scratch + p.M * chunks * digits * 64);
  d.sum = d.step + p.M * chunks;
  float *scale = d.sum + p.M * chunks * 16, *zero = scale + wide, *x = zero + wide, *shift = x + wide;
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
      whole = whole && prepare(x, K, w.nbits, m, d);
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
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = n + r * w.groups < w.N ? n + r * w.groups : n;
        tile.rows[r] = w.qdata + row * w.row_stride;
      }
      for (int64_t m = 0; m < p.M; m += kMaxTokens) {
        const int64_t tokens = p.M - m < kMaxTokens ? p.M - m : kMaxTokens;
        for (int64_t t = 0; t < kMaxTokens; ++t) {
          const int64_t token = t < tokens ? m + t : m;
          tile.x[t] = d.digits + token * chunks * digits * 64;
          for (int64_t r = 0; r < kRows; ++r) tile.scale[r][t] = d.step + token * chunks;
        }
        pick_tile(w.nbits, digits, false, tokens)(tile, K, 64);
        for (int64_t r = 0; r < kRows && n + r * w.groups < w.N; ++r)
          for (int64_t t = 0; t < tokens; ++t) store(p, m + t, n + r * w.groups, tile.out[r][t] - shift[m + t]);
      }
    }
  }
}

}  // namespace
