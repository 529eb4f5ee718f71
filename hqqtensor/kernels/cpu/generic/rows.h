// Rows: conversion of number types, unpacking, dense rows.
#pragma once
#include <cstdint>
#include <type_traits>

#include "dispatch/kernels.h"
#include "generic/vec_api.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

inline const char* element(const void* p, DType type, int64_t index) { return (const char*)p + index * size_of(type); }

void to_float(const void* from, DType type, int64_t count, float* out) {
  const uint16_t* h = (const uint16_t*)from;
  int64_t i = 0;
  if (type == DType::f32) {
    __builtin_memcpy(out, from, (size_t)count * 4);
    return;
  }
  for (; i + kFloats <= count; i += kFloats) f_store(out + i, type == DType::f16 ? f_load_f16(h + i) : f_load_bf16(h + i));
  if (const int64_t left = count - i) {
    float last[kFloats];
    f_store(last, type == DType::f16 ? f_load_f16_some(h + i, left) : f_load_bf16_some(h + i, left));
    __builtin_memcpy(out + i, last, (size_t)left * 4);
  }
}

template <DType T>
inline Floats load_as(const void* p, int64_t i) {
  if constexpr (T == DType::f32) return f_load((const float*)p + i);
  if constexpr (T == DType::f16) return f_load_f16((const uint16_t*)p + i);
  return f_load_bf16((const uint16_t*)p + i);
}

// The first n < kFloats from number i on, zeros behind.
template <DType T>
inline Floats load_some_as(const void* p, int64_t i, int64_t n) {
  if constexpr (T == DType::f32) return f_load_some((const float*)p + i, n);
  if constexpr (T == DType::f16) return f_load_f16_some((const uint16_t*)p + i, n);
  return f_load_bf16_some((const uint16_t*)p + i, n);
}

inline void store_half(uint16_t* p, DType type, Floats v) { type == DType::bf16 ? f_store_bf16(p, v) : f_store_f16(p, v); }

void from_float(const float* from, int64_t count, DType type, void* out) {
  uint16_t* h = (uint16_t*)out;
  if (type == DType::f32) {
    __builtin_memcpy(out, from, (size_t)count * 4);
    return;
  }
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) store_half(h + i, type, f_load(from + i));
  if (i < count) {
    uint16_t last[kFloats];
    store_half(last, type, f_load_some(from + i, count - i));
    __builtin_memcpy(h + i, last, (size_t)(count - i) * 2);
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
      for (int64_t i = 0; i < width; ++i) out[f * width + i] |= (uint8_t)(((b[i] >> (plane * f)) & ((1 << plane) - 1)) << low);
    b += width;
    low += plane;
  }
}

// The slabs of a short block of COUNT codes, added to what `out` holds, 8 (or 4) of them at a time.
template <int PLANE, int COUNT>
inline void add_slabs(const uint8_t* b, int low, uint8_t* out) {
  constexpr int width = COUNT * PLANE / 8;
  using Word = std::conditional_t<width % 8 == 0, uint64_t, uint32_t>;
  constexpr Word mask = (Word)0x0101010101010101 * (Word)((1 << PLANE) - 1);
  for (int i = 0; i < width; i += (int)sizeof(Word)) {
    Word in, sum;
    __builtin_memcpy(&in, b + i, sizeof in);
    for (int f = 0; f < 8 / PLANE; ++f) {
      __builtin_memcpy(&sum, out + f * width + i, sizeof sum);
      sum |= ((in >> (PLANE * f)) & mask) << low;
      __builtin_memcpy(out + f * width + i, &sum, sizeof sum);
    }
  }
}

template <int NB, int COUNT>
inline void unpack_short(const uint8_t* b, uint8_t* out) {
  __builtin_memset(out, 0, COUNT);
  if constexpr (NB == 8) add_slabs<8, COUNT>(b, 0, out);
  if constexpr ((NB & 4) != 0) add_slabs<4, COUNT>(b, 0, out);
  if constexpr ((NB & 2) != 0) add_slabs<2, COUNT>(b + COUNT / 8 * (NB & 4), NB & 4, out);
  if constexpr ((NB & 1) != 0) add_slabs<1, COUNT>(b + COUNT / 8 * (NB & 6), NB & 6, out);
}

// Codes of the short last block, `count` of them, with zeros behind up to a multiple of 64 where count is none of 32, 64
// and 96.
template <int NB>
void unpack_last(const uint8_t* b, int64_t count, uint8_t* out) {
  switch (count) {
    case 32: return unpack_short<NB, 32>(b, out);
#ifdef HQQTENSOR_HAS_HALF_BLOCK
    case 64: return store_codes(out, decode_half<NB>(b));
#else
    case 64: return unpack_short<NB, 64>(b, out);
#endif
    case 96: return unpack_short<NB, 96>(b, out);
    default: return unpack_tail(b, NB, (count + 7) / 8 * 8, out);
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

// Codes [0, count) at the begin of a block, as bytes: whole blocks, then a short last one where count is no multiple of 128.
// Room for `count` up to a multiple of 128. A function of its own, since all widths inlined are 10 KB wherever it is called.
__attribute__((noinline)) void unpack_codes(const uint8_t* b, int nbits, int64_t count, uint8_t* out) {
  const int64_t blocks = count / 128, rest = count % 128;
  with_nbits(nbits, [&](auto nb) {
    unpack_blocks<nb.value>(b, blocks, out);
    if (rest) unpack_last<nb.value>(b + blocks * 16 * nb.value, rest, out + blocks * 128);
  });
}

// Numbers of `count` bytes, or of the nibbles `PART` (1: low, 2: high) of as many, less `zero`, times `scale`. Zeros fill the
// last vector.
template <int PART>
inline void scale_codes(const uint8_t* codes, const float* scale, const float* zero, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats)
    f_store(out + i, f_mul(f_sub(f_codes<PART>(codes + i), f_load(zero + i)), f_load(scale + i)));
  if (const int64_t left = count - i)
    f_store(out + i,
            f_mul(f_sub(f_codes_some<PART>(codes + i, left), f_load_some(zero + i, left)), f_load_some(scale + i, left)));
}

template <DType T>
inline void load_plain(const char* data, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) f_store(out + i, load_as<T>(data, first + i));
  if (i < count) f_store(out + i, load_some_as<T>(data, first + i, count - i));
}

// Columns [first, first + count) of one row of scales or zero points, and zeros up to a multiple of kFloats numbers. Up to
// kFloats - 1 more may be written behind `count`.
inline void load_values(const Values& v, int64_t row, int64_t first, int64_t count, float* out) {
  const char* data = v.row(row);
  if (!v.quantized()) {
    if (v.type == DType::f16) return load_plain<DType::f16>(data, first, count, out);
    if (v.type == DType::bf16) return load_plain<DType::bf16>(data, first, count, out);
    return load_plain<DType::f32>(data, first, count, out);
  }
  const int64_t meta = row % v.meta_rows * v.meta_stride + first;
  const float *scale = v.meta_scale + meta, *zero = v.meta_zero + meta;
  if (v.type == DType::u8) return scale_codes<0>((const uint8_t*)data + first, scale, zero, count, out);
  for (int64_t done = 0; done < count;) {
    const int64_t column = first + done, block = column / 128 * 128, left = v.columns - block;
    const int64_t half = left < 128 ? (left + 1) / 2 : 64, place = column - block;
    const bool high = place >= half;
    const uint8_t* codes = (const uint8_t*)data + block / 2 + place - (high ? half : 0);
    const int64_t run = (high ? (left < 128 ? left : 128) : half) - place, here = run < count - done ? run : count - done;
    (high ? scale_codes<2> : scale_codes<1>)(codes, scale + done, zero + done, here, out + done);
    done += here;
  }
  for (int64_t i = count; i % kFloats; ++i) out[i] = 0;  // the last run may begin anywhere
}

// A row of codes with what they are scaled by.
struct CodeRow {
  const uint8_t* codes;
  const float *scale, *zero;

  CodeRow(const Values& v, int64_t row)
      : codes((const uint8_t*)v.row(row)), scale(v.meta_scale + row % v.meta_rows * v.meta_stride),
        zero(v.meta_zero + (scale - v.meta_scale)) {}
  // Some columns, whose codes are those bytes or their nibbles PART; no more than n where LAST, zeros behind.
  template <int PART, bool LAST>
  Floats load(int64_t byte, int64_t column, int64_t n) const {
    if constexpr (LAST)
      return f_mul(f_sub(f_codes_some<PART>(codes + byte, n), f_load_some(zero + column, n)), f_load_some(scale + column, n));
    return f_mul(f_sub(f_codes<PART>(codes + byte), f_load(zero + column)), f_load(scale + column));
  }
};

inline void prefetch_values(const Values& v, int64_t row) {
  if (!v.data) return;
  const char* p = v.row(row);
  for (int64_t i = 0; i < v.row_bytes(); i += 64) prefetch(p + i);
}

// What an integer product of codes and activations must be multiplied with besides their scales, and the number that
// takes the place of a zero point where the format has a table.
inline float code_unit(const Weight& w, int digits) {
  if (!w.table.values) return 1;
  const int both = digits < w.table.count ? digits : w.table.count;
  return w.table.unit * (float)(1 << (7 * (both - 1)));
}

// Results of rows n, n + step, ... for token m: v, plus bias.
inline void store_results(const Problem& p, int64_t m, int64_t n, int64_t step, int64_t count, float* v) {
  const int64_t size = size_of(p.x_type);
  if (p.bias)
    for (int64_t r = 0; r < count; ++r) v[r] += p.bias[n + r * step];
  char* y = (char*)p.y + (m * p.y_stride + n) * size;
  if (step == 1) return from_float(v, count, p.x_type, y);
  for (int64_t r = 0; r < count; ++r) from_float(v + r, 1, p.x_type, y + r * step * size);
}

constexpr int64_t kUnpackedCodes = 1024;  // codes unpacked at a time: they stay in L1

// Dense numbers of `count` codes. `scale` and `zero`: functions of the place that give a vector, or one number.
template <class Scale, class Zero>
inline void dequantize_codes(const Weight& w, const float* table, const uint8_t* codes, int64_t count, float* out, Scale scale,
                             Zero zero) {
  uint8_t padded_codes[kFloats] = {};
  for (int64_t i = 0; i < count; i += kFloats) {
    const uint8_t* c = codes + i;
    const int64_t left = count - i < kFloats ? count - i : kFloats;
    if (left < kFloats) c = (const uint8_t*)__builtin_memcpy(padded_codes, c, (size_t)left);
    const Floats number = table ? f_lookup(c, table, 1 << w.nbits) : f_sub(f_codes(c), zero(i));
    const Floats value = f_mul(number, scale(i));
    if (left == kFloats) {
      f_store(out + i, value);
    } else {
      float tail[kFloats];
      f_store(tail, value);
      __builtin_memcpy(out + i, tail, (size_t)left * 4);
    }
  }
}

// The same with a scale and a zero point for each code.
inline void dequantize_columns(const Weight& w, const float* table, const uint8_t* codes, int64_t count, const float* scale,
                               const float* zero, float* out) {
  dequantize_codes(
      w, table, codes, count, out, [&](int64_t i) { return f_load(scale + i); }, [&](int64_t i) { return f_load(zero + i); });
}
// The same with one scale and one zero point.
inline void dequantize_group(const Weight& w, const float* table, const uint8_t* codes, int64_t count, float scale, float zero,
                             float* out) {
  const Floats s = f_set(scale), z = f_set(zero);
  dequantize_codes(w, table, codes, count, out, [&](int64_t) { return s; }, [&](int64_t) { return z; });
}

void dequantize_row(const Weight& w, int64_t n, float* out) {
  const uint8_t* row = w.qdata + n * w.row_stride;
  const float* table = w.table.values ? w.table.values + n * w.table.stride : nullptr;
  const int64_t values_row = w.axis == 1 ? n : n % w.groups;
  uint8_t codes[kUnpackedCodes + 64];
  float scale[kUnpackedCodes + kFloats], zero[kUnpackedCodes + kFloats];
  const auto load = [&](int64_t first, int64_t count) {
    load_values(w.scale, values_row, first, count, scale);
    if (w.zero.data) load_values(w.zero, values_row, first, count, zero);
  };
  int64_t group = -1, group_end = 0, cached = 0, cached_end = 0;
  for (int64_t first = 0; first < w.K; first += kUnpackedCodes) {
    const int64_t count = w.K - first < kUnpackedCodes ? w.K - first : kUnpackedCodes;
    unpack_codes(row + first / 8 * w.nbits, w.nbits, count, codes);
    if (w.axis == 0) {
      load(first, count);
      dequantize_columns(w, table, codes, count, scale, zero, out + first);
      continue;
    }
    for (int64_t k = first; k < first + count;) {
      if (k >= group_end) {
        ++group;
        group_end = w.groups == 1 ? w.K : (group + 1) * w.group_size;
        if (group >= cached_end) {
          cached = group;
          cached_end = group + kUnpackedCodes < w.groups ? group + kUnpackedCodes : w.groups;
          load(cached, cached_end - cached);
        }
      }
      const int64_t end = group_end < first + count ? group_end : first + count;
      dequantize_group(w, table, codes + (k - first), end - k, scale[group - cached], w.zero.data ? zero[group - cached] : 0.0f,
                       out + k);
      k = end;
    }
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
