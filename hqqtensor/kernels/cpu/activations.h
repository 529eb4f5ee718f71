// Activations as integers (struct Digits): what they are multiplied with before, how fine they are, how they lie.
#pragma once
#include "rows.h"

namespace {

// Bits of a digit of the activations.
inline int x_shift(const Weight& w) { return w.table.count > 1 ? 7 : digit_shift(w.nbits); }

// Largest integer for an activation: its digits must fit, and 4 products with codes must fit 31 bits. (Where Pairs serve, 8
// do: of three digits with codes of 5 bits at most, of two with codes left in place, of 8 bits. Where Wide serves, 32 do, of
// two digits with codes left in place.)
inline float digit_limit(const Weight& w, int count) {
  if (count == 1) return 127;
  const int shift = x_shift(w);
  const float digit = (float)((1 << (shift - 1)) - 1);
  const float whole = digit * (float)(count == 2 ? 1 << shift : (1 << (2 * shift)) + (1 << shift));
  if (w.table.count > 1) return whole;
  const float fits = 2147483648.0f / (float)(4 * ((1 << w.nbits) - 1)) * 0.999f;
  return whole < fits ? whole : fits;
}

// `rounded`, where it is not null: gets what the digits stand for.
bool make_digits(const float* x, const Weight& w, int64_t m, const Digits& d, float* rounded) {
  const float limit = d.wide && d.count == 2 ? (w.table.count > 1 ? 8191.0f : 32767.0f) : digit_limit(w, d.count);
  const int shift = x_shift(w);
  const bool by_group = hqqtensor::step_per_group(w);
  const int64_t run = by_group && w.group_size == 128 ? 2 : 1;  // chunks that share a step
  const int64_t each = by_group && w.group_size < 64 ? 64 / w.group_size : 1;  // entries of a chunk
  const int64_t width = hqqtensor::padded(w.groups), quads = w.groups == 1 ? INT64_MAX : w.group_size / 4;
  float *step = d.step + m * d.entries, *sums = d.sum + m * width;
  const Digits::Place place = d.place(m);
  double total = 0;
  int64_t group = 0, left = quads;
  for (int64_t c = 0; c < d.chunks; c += run) {
    float padded_x[128];
    const float* in = x + 64 * c;
    const int64_t count = w.K - 64 * c;
    if (count < 64 * run) {
      __builtin_memset(padded_x, 0, sizeof padded_x);
      __builtin_memcpy(padded_x, in, (size_t)count * 4);
      in = padded_x;
    }
    const float top = f_largest(in, 64 * run);  // NaN where one is among them
    if (!(top < 1e37f) || (top != 0 && top < 1e-28f)) return false;
    const float unit = top / limit, inverse = top == 0 ? 0 : limit / top;
    for (int64_t i = 0; i < each; ++i) step[c / run * each + i] = unit;
    for (int64_t part = c; part < c + run && part < d.chunks; ++part, in += 64) {
      int8_t* out = place.at + part * place.by_chunk;
      float whole[64];
      const auto chunk = [&](int shift, int count, int64_t by_digit, int64_t by_quad) __attribute__((always_inline)) {
        for (int i = 0; i < 64; i += kFloats) {
          const Floats v = f_mul(f_load(in + i), f_set(inverse));
          if (w.axis == 1) f_store(whole + i, f_round(v));
          if (rounded) f_store(rounded + 64 * part + i, f_mul(f_round(v), f_set(unit)));
          f_store_digits(out + i / 4 * by_quad, v, shift, count, by_digit, by_quad);
        }
      };
      if (d.tile == 0 && shift == 8 && d.count == 2)  // the most frequent cases by themselves, twice as fast
        chunk(8, 2, 64, 4);
      else if (d.tile == 0 && shift == 8 && d.count == 3)
        chunk(8, 3, 64, 4);
      else
        chunk(shift, d.count, place.by_digit, place.by_quad);
      if (w.axis == 0) continue;
      for (int i = 0; i < 64; i += 4) {
        total += (double)((whole[i] + whole[i + 1]) + (whole[i + 2] + whole[i + 3])) * unit;
        if (--left == 0) {
          if (group < w.groups) sums[group++] = (float)total;
          total = 0;
          left = quads;
        }
      }
    }
  }
  if (w.axis == 1) {
    if (group < w.groups) sums[group++] = (float)total;
    for (; group < width; ++group) sums[group] = 0;
  }
  return true;
}

// Whole blocks as linear_rows wants them where it multiplies them as Wide or as Pairs: digits in their order; with Pairs also
// steps of second chunks less, where their codes count 16-fold.
bool pairs_serve(const Weight& w, const Digits& d) {
  bool found = false;
  with_nbits(w.nbits, [&](auto nb) { found = Pairs<nb.value>::serve; });
  return found && d.tile == 0;
}
constexpr bool codes_in_place(int digits, bool table) { return digits <= 2 && !table; }

// What has a scale: a chunk; runs of 8 codes and more of a chunk, 64 / group_size in all; each quad (see quad_rows).
enum class ScaleOf { chunk, lanes, quads };
inline ScaleOf scale_of(const Weight& w) {
  if (hqqtensor::quad_rows(w)) return ScaleOf::quads;
  return w.axis == 1 && w.groups > 1 && w.group_size < 64 ? ScaleOf::lanes : ScaleOf::chunk;
}

bool wide_serves(const Weight& w, const Digits& d) {
  bool found = false;
  with_nbits(w.nbits, [&](auto nb) { found = Wide<nb.value>::serve; });
  return found && d.tile == 0 && !w.table.values && scale_of(w) == ScaleOf::chunk;
}

void order_digits(const Weight& w, int64_t m, const Digits& d) {
  int8_t* row = d.digits + m * d.chunks * d.count * 64;
  if (wide_serves(w, d))
    return with_nbits(w.nbits, [&](auto nb) {
      using W = Wide<nb.value>;
      if constexpr (W::serve)
        for (int64_t b = 0; b + W::blocks <= w.K / 128; b += W::blocks) W::order(row + 2 * b * d.count * 64, d.count);
    });
  if (!pairs_serve(w, d)) return;
  float* step = d.step + m * d.entries;
  const bool by_group = hqqtensor::step_per_group(w), shared = by_group && w.group_size == 128;  // see RowMeta for these
  const int64_t each = by_group && w.group_size < 64 ? 64 / w.group_size : 1;
  for (int64_t b = 0; b < w.K / 128; ++b) {
    for (int i = 0; i < d.count; ++i) pair_digits(row + (2 * b * d.count + i) * 64, row + ((2 * b + 1) * d.count + i) * 64);
    if (codes_in_place(d.count, w.table.values != nullptr) && !shared)
      for (int64_t i = 0; i < each; ++i) step[(2 * b + 1) * each + i] /= 16;
  }
}

bool prepare(const float* x, const Weight& w, int64_t m, const Digits& d) {
  if (!make_digits(x, w, m, d, nullptr)) return false;
  order_digits(w, m, d);
  return true;
}

// K activations times scales and their sum times the zero points (`constant` where z is null); all of one type.
template <DType T>
double scale_activations(const float* x, const void* s, const void* z, float constant, int64_t K, float* out) {
  constexpr int kSums = 4;
  Floats sums[kSums];
  for (Floats& sum : sums) sum = f_zero();
  const auto step = [&](int64_t k, Floats& sum) __attribute__((always_inline)) {
    const Floats v = f_mul(f_load(x + k), load_as<T>(s, k));
    f_store(out + k, v);
    sum = f_fma(v, z ? load_as<T>(z, k) : f_set(constant), sum);
  };
  int64_t k = 0;
  for (; k + kSums * kFloats <= K; k += kSums * kFloats)
    for (int i = 0; i < kSums; ++i) step(k + i * kFloats, sums[i]);
  double total = 0;
  for (const Floats& sum : sums) total += (double)f_sum(sum);
  float scale = 0, zero = constant;
  for (; k < K; ++k) {
    to_float(at(s, T, k), T, 1, &scale);
    if (z) to_float(at(z, T, k), T, 1, &zero);
    out[k] = x[k] * scale;
    total += (double)(out[k] * zero);
  }
  return total;
}

inline double weighted_sum(const float* v, const float* z, float constant, int64_t K) {
  Floats sum = f_zero();
  int64_t k = 0;
  for (; k + kFloats <= K; k += kFloats) sum = f_fma(f_load(v + k), z ? f_load(z + k) : f_set(constant), sum);
  double total = (double)f_sum(sum);
  for (; k < K; ++k) total += (double)(v[k] * (z ? z[k] : constant));
  return total;
}

// scratch: 2 K + 192 floats.
bool prepare_axis0(const float* x, const Weight& w, int64_t g, int64_t m, const Digits& d, float* scratch) {
  float *scaled = scratch, *values = scratch + w.K + 96;
  const float constant = w.table.offset * w.table.unit;
  const void *s = w.scale.row(g), *z = w.zero.data ? w.zero.row(g) : nullptr;
  // With digits of 8 bits alone zero points meet what the products see, so that an error of rounding meets code - zero
  // point, not code.
  const bool mixed = w.scale.quantized() || (z && w.zero.type != w.scale.type), late = mixed || d.count == 1;
  double total = 0;
  if (mixed) {
    load_values(w.scale, g, 0, w.K, values);
    scale_activations<DType::f32>(x, values, nullptr, 0, w.K, scaled);
  } else {
    total = w.scale.type == DType::f16    ? scale_activations<DType::f16>(x, s, z, constant, w.K, scaled)
            : w.scale.type == DType::bf16 ? scale_activations<DType::bf16>(x, s, z, constant, w.K, scaled)
                                          : scale_activations<DType::f32>(x, s, z, constant, w.K, scaled);
  }
  if (!make_digits(scaled, w, m, d, d.count == 1 ? scaled : nullptr)) return false;
  if (late) {
    if (z) load_values(w.zero, g, 0, w.K, values);
    total = weighted_sum(scaled, z ? values : nullptr, constant, w.K);
  }
  order_digits(w, m, d);
  if (m == 0 && g + 1 < w.groups) {  // those of the next group, while this one's rows are multiplied
    fetch_values(w.scale, g + 1);
    fetch_values(w.zero, g + 1);
  }
  d.sum[m] = (float)total;
  float* step = d.step + m * d.entries;
  const float unit = code_unit(w, d.count);
  if (unit != 1)
    for (int64_t c = 0; c < d.chunks; ++c) step[c] *= unit;
  return true;
}

}  // namespace
