// Rows: conversion of number types, unpacking, dense rows, activations as integers.
#pragma once
#include "kernels.h"

namespace {

using hqqtensor::Digits;
using hqqtensor::DType;
using hqqtensor::Problem;
using hqqtensor::Weight;

inline const char* at(const void* p, DType type, int64_t index) {
  return (const char*)p + index * (type == DType::f32 ? 4 : 2);
}

void to_float(const void* from, DType type, int64_t count, float* out) {
  const uint16_t* h = (const uint16_t*)from;
  int64_t i = 0;
  if (type == DType::f32) {
    __builtin_memcpy(out, from, (size_t)count * 4);
    return;
  }
  for (; i + kFloats <= count; i += kFloats) f_store(out + i, type == DType::f16 ? f_load_f16(h + i) : f_load_bf16(h + i));
  if (i < count) {
    uint16_t in[kFloats] = {};
    float tail[kFloats];
    __builtin_memcpy(in, h + i, (size_t)(count - i) * 2);
    f_store(tail, type == DType::f16 ? f_load_f16(in) : f_load_bf16(in));
    __builtin_memcpy(out + i, tail, (size_t)(count - i) * 4);
  }
}

inline uint16_t bf16_bits(float f) {  // round to nearest even, NaN kept
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void from_float(const float* from, int64_t count, DType type, void* out) {
  uint16_t* h = (uint16_t*)out;
  if (type == DType::f32) {
    __builtin_memcpy(out, from, (size_t)count * 4);
  } else if (type == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) h[i] = bf16_bits(from[i]);
  } else {
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) f_store_f16(h + i, f_load(from + i));
    if (i < count) {
      float in[kFloats] = {};
      uint16_t tail[kFloats];
      __builtin_memcpy(in, from + i, (size_t)(count - i) * 4);
      f_store_f16(tail, f_load(in));
      __builtin_memcpy(h + i, tail, (size_t)(count - i) * 2);
    }
  }
}

// Codes of the short last block (count < 128, a multiple of 8) as 128 bytes, zeros behind.
void unpack_tail(const uint8_t* b, int nbits, int64_t count, uint8_t* out) {
  __builtin_memset(out, 0, 128);
  int low = 0;
  for (int plane = 8; plane; plane >>= 1) {
    if (!(nbits & plane)) continue;
    const int64_t width = count * plane / 8;
    for (int f = 0; f < 8 / plane; ++f)
      for (int64_t i = 0; i < width; ++i)
        out[f * width + i] |= (uint8_t)(((b[i] >> (plane * f)) & ((1 << plane) - 1)) << low);
    b += width;
    low += plane;
  }
}

template <int NB>
void unpack_blocks(const uint8_t* b, int64_t blocks, uint8_t* out) {
  for (int64_t i = 0; i < blocks; ++i, b += 16 * NB, out += 128) {
    store_codes(out, decode<NB, 0>(b));
    store_codes(out + 64, decode<NB, 1>(b));
  }
}

template <class F>
inline void with_nbits(int nbits, F f) {
  switch (nbits) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 8>());
  }
}

constexpr int64_t kStretch = 1024;  // codes unpacked at a time: they stay in L1

// (code - zero) * scale for `count` codes with one scale and zero for all, or one for each.
inline void spread(const uint8_t* codes, int64_t count, float scale, float zero, float* out) {
  const Floats s = f_set(scale), z = f_set(zero);
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) f_store(out + i, f_mul(f_sub(f_codes(codes + i), z), s));
  for (; i < count; ++i) out[i] = ((float)codes[i] - zero) * scale;
}

void dequantize_row(const Weight& w, int64_t n, float* out) {
  const uint8_t* row = w.qdata + n * w.row_stride;
  const int64_t blocks = w.K / 128, meta_row = (w.axis == 1 ? n : n % w.groups) * w.meta_stride;
  uint8_t codes[kStretch];
  float scale[kStretch], zero[kStretch];
  int64_t group = -1, group_end = 0, cached = 0, cached_end = 0;
  for (int64_t first = 0; first < w.K; first += kStretch) {
    const int64_t count = w.K - first < kStretch ? w.K - first : kStretch;
    const int64_t whole = (first + count) / 128 > blocks ? blocks : (first + count) / 128;
    with_nbits(w.nbits, [&](auto nb) {
      unpack_blocks<nb.value>(row + first / 128 * 16 * nb.value, whole - first / 128, codes);
    });
    if (first + count > whole * 128)
      unpack_tail(row + whole * 16 * w.nbits, w.nbits, (w.K - whole * 128 + 7) / 8 * 8, codes + whole * 128 - first);
    if (w.axis == 0) {
      to_float(at(w.scale, w.meta, meta_row + first), w.meta, count, scale);
      to_float(at(w.zero, w.meta, meta_row + first), w.meta, count, zero);
      int64_t i = 0;
      for (; i + kFloats <= count; i += kFloats)
        f_store(out + first + i, f_mul(f_sub(f_codes(codes + i), f_load(zero + i)), f_load(scale + i)));
      for (; i < count; ++i) out[first + i] = ((float)codes[i] - zero[i]) * scale[i];
      continue;
    }
    for (int64_t k = first; k < first + count;) {
      if (k >= group_end) {
        ++group;
        group_end = w.groups == 1 ? w.K : (group + 1) * w.group_size;
        if (group >= cached_end) {
          cached = group;
          cached_end = group + kStretch < w.groups ? group + kStretch : w.groups;
          to_float(at(w.scale, w.meta, meta_row + cached), w.meta, cached_end - cached, scale);
          to_float(at(w.zero, w.meta, meta_row + cached), w.meta, cached_end - cached, zero);
        }
      }
      const int64_t end = group_end < first + count ? group_end : first + count;
      spread(codes + (k - first), end - k, scale[group - cached], zero[group - cached], out + k);
      k = end;
    }
  }
}

// Largest integer for an activation: its digits must fit, and 4 products with codes must fit 31 bits.
inline float digit_limit(int nbits, int count) {
  const int shift = digit_shift(nbits);
  const float digit = (float)((1 << (shift - 1)) - 1);
  if (count == 1) return digit;
  const float whole = digit * (float)(count == 2 ? 1 << shift : (1 << (2 * shift)) + (1 << shift));
  const float fits = 2147483648.0f / (float)(4 * ((1 << nbits) - 1)) * 0.999f;
  return whole < fits ? whole : fits;
}

bool prepare(const float* x, const Weight& w, int64_t m, const Digits& d) {
  const float limit = digit_limit(w.nbits, d.count);
  const int shift = digit_shift(w.nbits);
  const bool by_group = hqqtensor::step_per_group(w);
  const int64_t run = by_group && w.group_size == 128 ? 2 : 1;  // chunks that share a step
  const int64_t each = by_group && w.group_size < 64 ? 64 / w.group_size : 1;  // entries of a chunk
  const int64_t width = hqqtensor::padded(w.groups), quads = w.groups == 1 ? INT64_MAX : w.group_size / 4;
  float *step = d.step + m * d.entries, *sums = d.sum + m * width;
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
    Floats largest = f_zero(), nan = f_zero();
    for (int i = 0; i < 64 * run; i += kFloats) {
      const Floats v = f_load(in + i);
      largest = f_max(largest, f_abs(v));
      nan = f_fma(v, f_zero(), nan);  // 0 unless a number is NaN or Inf
    }
    const float top = f_hmax(largest);
    if (f_sum(nan) != 0 || !(top < 1e37f) || (top != 0 && top < 1e-28f)) return false;
    const float unit = top / limit, inverse = top == 0 ? 0 : limit / top;
    for (int64_t i = 0; i < each; ++i) step[c / run * each + i] = unit;
    for (int64_t part = c; part < c + run && part < d.chunks; ++part, in += 64) {
      int8_t* out = d.digits + (m * d.chunks + part) * d.count * 64;
      float whole[64];
      for (int i = 0; i < 64; i += kFloats) {
        const Floats v = f_round(f_mul(f_load(in + i), f_set(inverse)));
        f_store(whole + i, v);
        f_store_digits(out + i, v, shift, d.count);
      }
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

}  // namespace
