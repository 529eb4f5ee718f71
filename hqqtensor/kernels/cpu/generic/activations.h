// Quantizes activations to integers (struct QuantizedActivations): the scale applied first, the number of digits, and the
// memory layout.
#pragma once
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
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

// Chunks at a time: their steps come from one division, and floats stay in the first level of cache.
constexpr int64_t kChunksPerPiece = 16;

// Digits and steps of `count` chunks from `first` on, up to kChunksPerPiece, in `in` with zeros behind the last number.
// `rounded`, where it is not null, gets what the digits stand for: integers with axis 1, whose sums they make, else times their
// steps.
bool quantize_chunks(const float* in, const Weight& w, int64_t m, const QuantizedActivations& d, int64_t first, int64_t count,
                     float* rounded) {
  const float limit =
      d.layout == Layout::tiles_int16 && d.count == 2 ? (w.table.count > 1 ? 8191.0f : 32767.0f) : digit_limit(w, d.count);
  const int shift = x_shift(w);
  const bool shared = step_spans_two_chunks(w);
  const int64_t each = steps_of_chunk(w);
  alignas(64) float top[kChunksPerPiece], unit[kChunksPerPiece], inverse[kChunksPerPiece];
  f_largest_each(in, count, top);
  bool served = true;
  for (int64_t c = 0; c < kChunksPerPiece; ++c) served &= top[c] < 1e37f;  // not where one is NaN
  for (int64_t c = 0; c < kChunksPerPiece && shared; c += 2) top[c] = top[c + 1] = top[c] > top[c + 1] ? top[c] : top[c + 1];
  for (int64_t c = 0; c < kChunksPerPiece; ++c) {
    served &= top[c] == 0 || top[c] >= 1e-28f;
    unit[c] = top[c] / limit;
    inverse[c] = limit / (top[c] > 1e-28f ? top[c] : 1e-28f);
  }
  if (!served) return false;
  float* step = d.step + m * d.steps_per_row + (shared ? first / 2 : first * each);
  for (int64_t c = 0; c < count; c += shared ? 2 : 1)
    for (int64_t i = 0; i < each; ++i) *step++ = unit[c];
  const QuantizedActivations::Token token = d.token(m);
  int8_t* out = token.data + first * token.chunk_stride;
  const auto frequent = [&](auto digits) {
    for (int64_t c = 0; c < count; ++c) f_store_chunk<digits.value>(out + c * token.chunk_stride, in + 64 * c, inverse[c]);
  };
  if (d.tile > 0 || shift != 8) {
    for (int64_t c = 0; c < count; ++c, out += token.chunk_stride)
      for (int i = 0; i < 64; i += kFloats)
        f_store_digits(out + i / 4 * token.quad_stride, f_mul(f_load(in + 64 * c + i), f_set(inverse[c])), shift, d.count,
                       token.digit_stride, token.quad_stride);
  } else if (d.count == 1) {
    frequent(std::integral_constant<int, 1>());
  } else if (d.count == 2) {
    frequent(std::integral_constant<int, 2>());
  } else {
    frequent(std::integral_constant<int, 3>());
  }
  for (int64_t i = 0; i < 64 * count && rounded; i += kFloats) {
    const Floats v = f_round(f_mul(f_load(in + i), f_set(inverse[i / 64])));
    f_store(rounded + i, w.axis == 1 ? v : f_mul(v, f_set(unit[i / 64])));
  }
  return true;
}

// Whole blocks as linear_rows wants them where it multiplies them as Wide or as Pairs: digits in their order; with Pairs also
// steps of second chunks less, where their codes count 16-fold.
bool pairs_serve(const Weight& w, const QuantizedActivations& d) {
  bool found = false;
  with_nbits(w.nbits, [&](auto nb) { found = Pairs<nb.value>::serve; });
  return found && d.tile == 0;
}
constexpr bool codes_in_place(int digits, bool table) { return digits <= 2 && !table; }

// What has a scale: a chunk; runs of 8 codes and more of a chunk, 64 / group_size in all; each quad (see quad_rows).
enum class ScaleOf { chunk, lanes, quads };
inline ScaleOf scale_of(const Weight& w) {
  if (quad_rows(w)) return ScaleOf::quads;
  return w.axis == 1 && w.groups > 1 && w.group_size < 64 ? ScaleOf::lanes : ScaleOf::chunk;
}

bool wide_serves(const Weight& w, const QuantizedActivations& d) {
  bool found = false;
  with_nbits(w.nbits, [&](auto nb) { found = Wide<nb.value>::serve; });
  return found && d.tile == 0 && !w.table.values && scale_of(w) == ScaleOf::chunk;
}

void reorder_for_gemv(const Weight& w, int64_t m, const QuantizedActivations& d) {
  int8_t* row = d.digits + m * d.chunks * d.count * 64;
  if (wide_serves(w, d))
    return with_nbits(w.nbits, [&](auto nb) {
      using W = Wide<nb.value>;
      if constexpr (W::serve)
        for (int64_t b = 0; b + W::blocks <= w.K / 128; b += W::blocks) W::order(row + 2 * b * d.count * 64, d.count);
    });
  if (!pairs_serve(w, d)) {
    const ScaleOf by = scale_of(w);
    for (int64_t c = 0; c < d.chunks && d.tile == 0 && by != ScaleOf::quads; ++c)
      order_digits(w.nbits, d.count, by == ScaleOf::lanes, row + c * d.count * 64);
    return;
  }
  float* step = d.step + m * d.steps_per_row;
  const bool shared = step_spans_two_chunks(w);  // then RowMeta divides the scale
  const int64_t each = steps_of_chunk(w);
  for (int64_t b = 0; b < w.K / 128; ++b) {
    for (int i = 0; i < d.count; ++i) pair_digits(row + (2 * b * d.count + i) * 64, row + ((2 * b + 1) * d.count + i) * 64);
    if (codes_in_place(d.count, w.table.values != nullptr) && !shared)
      for (int64_t i = 0; i < each; ++i) step[(2 * b + 1) * each + i] /= 16;
  }
}

// f(first, count, floats) for each piece of a row of K numbers: these, or, where they end within a chunk, a copy in `buffer`
// with zeros behind. False as soon as f is.
template <class F>
bool for_each_piece(const float* x, int64_t K, float* buffer, F f) {
  for (int64_t k = 0; k < K; k += 64 * kChunksPerPiece) {
    const int64_t count = K - k < 64 * kChunksPerPiece ? K - k : 64 * kChunksPerPiece;
    const float* in = x + k;
    if (count % 64) {
      __builtin_memset(buffer, 0, sizeof(float) * 64 * kChunksPerPiece);
      in = (const float*)__builtin_memcpy(buffer, in, (size_t)count * 4);
    }
    if (!f(k, count, in)) return false;
  }
  return true;
}

bool quantize_activations(const float* x, const Weight& w, int64_t m, const QuantizedActivations& d) {
  if (d.tile == 0 && spans_serve(w, d.count)) return quantize_spans(x, w.K, digit_limit(w, d.count), m, d);
  alignas(64) float buffer[64 * kChunksPerPiece], whole[64 * kChunksPerPiece];
  const int64_t width = padded(w.groups), quads = w.groups == 1 ? INT64_MAX : w.group_size / 4;
  float *sums = d.sum + m * width, *step = d.step + m * d.steps_per_row;
  double total = 0;
  int64_t group = 0, left = quads;
  const bool served = for_each_piece(x, w.K, buffer, [&](int64_t k, int64_t count, const float* in) {
    if (!quantize_chunks(in, w, m, d, k / 64, (count + 63) / 64, whole)) return false;
    float unit = 0;
    for (int64_t i = 0; i < count; i += 4) {
      if (i % 64 == 0) unit = step[step_index(w, (k + i) / 64)];
      total += (double)((whole[i] + whole[i + 1]) + (whole[i + 2] + whole[i + 3])) * unit;
      if (--left == 0) {
        if (group < w.groups) sums[group++] = (float)total;
        total = 0;
        left = quads;
      }
    }
    return true;
  });
  if (!served) return false;
  if (group < w.groups) sums[group++] = (float)total;
  for (; group < width; ++group) sums[group] = 0;
  reorder_for_gemv(w, m, d);
  return true;
}

// What loads vectors of scales or zero points [first, first + count) of a row, as f(load) gets it: load(i) from column
// first + i on. They are read where they lie, but for quantized ones and where the last vector is not whole.
template <class F>
void with_values(const Values& v, int64_t row, int64_t first, int64_t count, F f) {
  const char* data = v.row(row);
  if (!v.quantized() && count % kFloats == 0) {
    data = element(data, v.type, first);
    if (v.type == DType::f16) return f([=](int64_t i) { return load_as<DType::f16>(data, i); });
    if (v.type == DType::bf16) return f([=](int64_t i) { return load_as<DType::bf16>(data, i); });
    return f([=](int64_t i) { return load_as<DType::f32>(data, i); });
  }
  alignas(64) float buffer[64 * kChunksPerPiece];
  load_values(v, row, first, count, buffer);
  f([&](int64_t i) { return f_load(buffer + i); });
}

bool quantize_activations_axis0(const float* x, const Weight& w, int64_t g, int64_t m, const QuantizedActivations& d) {
  alignas(64) float buffer[64 * kChunksPerPiece], scaled[64 * kChunksPerPiece];
  const float constant = w.table.offset * w.table.unit;  // in the zero points' place
  double total = 0;
  // The next group's are fetched while this one's are used, evenly spread.
  const bool more = m == 0 && g + 1 < w.groups;
  const auto by_chunk = [&](const Values& v) { return more && v.data ? (v.row_bytes() + d.chunks - 1) / d.chunks : 0; };
  const int64_t scale_bytes = by_chunk(w.scale), zero_bytes = by_chunk(w.zero);
  const char *scales = w.scale.row(g) + w.scale.stride, *zeros = w.zero.data ? w.zero.row(g) + w.zero.stride : nullptr;
  const auto prefetch_chunk = [&](int64_t chunk) __attribute__((always_inline)) {
    for (int64_t i = 0; i < scale_bytes; i += 64) prefetch(scales + chunk * scale_bytes + i);
    for (int64_t i = 0; i < zero_bytes; i += 64) prefetch(zeros + chunk * zero_bytes + i);
  };
  const bool served = for_each_piece(x, w.K, buffer, [&](int64_t k, int64_t count, const float* in) {
    const auto add_zeros = [&](auto load) __attribute__((always_inline)) {
      constexpr int kSums = 4;
      Floats sums[kSums];
      for (Floats& sum : sums) sum = f_zero();
      int64_t i = 0;
      for (; i + kSums * kFloats <= count; i += kSums * kFloats)
        for (int j = 0; j < kSums; ++j) sums[j] = f_fma(f_load(scaled + i + j * kFloats), load(i + j * kFloats), sums[j]);
      for (; i < count; i += kFloats) sums[0] = f_fma(f_load(scaled + i), load(i), sums[0]);
      total += (double)f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
    };
    const auto add = [&] {
      if (w.zero.data) return with_values(w.zero, g, k, count, add_zeros);
      add_zeros([&](int64_t) { return f_set(constant); });
    };
    with_values(w.scale, g, k, count, [&](auto load) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; i += kFloats) {
        if (i % 64 == 0) prefetch_chunk((k + i) / 64);
        f_store(scaled + i, f_mul(f_load(in + i), load(i)));
      }
    });
    for (int64_t i = (count + kFloats - 1) / kFloats * kFloats; i % 64; ++i) scaled[i] = 0;
    // With digits of 8 bits alone zero points meet what the products see, so that an error of rounding meets code - zero
    // point, not code.
    if (d.count > 1) add();
    if (!quantize_chunks(scaled, w, m, d, k / 64, (count + 63) / 64, d.count > 1 ? nullptr : scaled)) return false;
    if (d.count == 1) add();
    return true;
  });
  if (!served) return false;
  reorder_for_gemv(w, m, d);
  d.sum[m] = (float)total;
  float* step = d.step + m * d.steps_per_row;
  const float unit = code_unit(w, d.count);
  if (unit != 1)
    for (int64_t c = 0; c < d.chunks; ++c) step[c] *= unit;
  return true;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
