// Packed weights of random settings and numbers, in buffers that end where their numbers do.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "standalone.h"

namespace hqqtensor {

// `count` numbers of `type` in [low, high].
inline void* random_numbers(Random& r, Buffers& b, DType type, int64_t count, float low, float high) {
  char* const out = (char*)b.take(count * size_of(type), size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    const float value = r.real(low, high);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == DType::f32) {
      std::memcpy(out + 4 * i, &value, 4);
    } else {
      // float16 is cut off, and what is too small for it becomes zero.
      const int exponent = (int)(bits >> 23 & 255) - 112;
      const uint32_t half = exponent < 1 ? 0 : (bits >> 16 & 0x8000) | (uint32_t)exponent << 10 | (bits >> 13 & 0x3FF);
      const auto stored = (uint16_t)(type == DType::bf16 ? bits >> 16 : half);
      std::memcpy(out + 2 * i, &stored, 2);
    }
  }
  return out;
}

inline uint8_t* random_bytes(Random& r, Buffers& b, int64_t count) {
  auto* const out = b.take<uint8_t>(count);
  for (int64_t i = 0; i < count; ++i) out[i] = (uint8_t)r.below(256);
  return out;
}

inline Values random_values(Random& r, Buffers& b, DType type, int64_t rows, int64_t columns, float low, float high) {
  Values v{};
  v.type = type, v.columns = columns, v.meta_rows = 1;
  if (type != DType::u8 && type != DType::u4) {
    v.stride = columns * size_of(type);
    v.data = random_numbers(r, b, type, rows * columns, low, high);
    return v;
  }
  v.stride = v.row_bytes();
  v.data = random_bytes(r, b, rows * v.stride);
  const float top = type == DType::u8 ? 255 : 15, unit = (high - low) / top;
  v.meta_rows = r.from_to(1, 3), v.meta_stride = columns;
  v.meta_scale = (const float*)random_numbers(r, b, DType::f32, v.meta_rows * columns, unit / 2, unit);
  auto* const zero = b.take<float>(v.meta_rows * columns);
  for (int64_t i = 0; i < v.meta_rows * columns; ++i) zero[i] = -low / v.meta_scale[i];
  v.meta_zero = zero;
  return v;
}

// A table whose digits and values say the same, as torch/table.cpp makes them. digits: those of the activations.
inline Table random_table(Random& r, Buffers& b, int nbits, int64_t rows, int digits) {
  Table t{};
  const int64_t entries = (int64_t)1 << nbits;
  const bool by_row = rows > 1 && r.chance(3);
  const int64_t count = by_row ? rows * entries : entries;
  auto* const values = (float*)random_numbers(r, b, DType::f32, count, -1, 1);
  t.values = values, t.stride = by_row ? entries : 0;
  if (by_row || nbits > 4 || !digits || r.chance(5)) return t;
  t.count = r.chance(2) ? 1 : digits == 3 ? 3 : 2;
  const int64_t numbers = t.count == 1 ? 32 : (int64_t)1 << 7 * t.count;
  t.unit = 1.0f / (float)numbers, t.offset = (float)(numbers / 2);
  for (int64_t c = 0; c < entries; ++c) {
    int64_t number = r.below(numbers);
    values[c] = t.unit * ((float)number - t.offset);
    for (int d = t.count - 1; d >= 0; --d, number >>= 7) t.digits[d][c] = (uint8_t)(number & 127);
  }
  return t;
}

// Any weight that the operators let through. axis, N, K: those asked for, or any where they are negative.
inline Weight random_weight(Random& r, Buffers& b, int digits, int axis = -1, int64_t N = -1, int64_t K = -1) {
  Weight w{};
  w.axis = axis >= 0 ? axis : (int)r.below(2);
  w.N = N >= 0 ? N : r.chance(3) ? r.from_to(1, 150) : r.from_to(1, 40);
  w.K = K >= 0 ? K : r.chance(2) ? 8 * r.from_to(1, 80) : r.chance(2) ? 64 * r.from_to(1, 10) : r.from_to(1, 500);
  w.group_size = r.choose<int64_t>({1, 2, 4, 5, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 100, 128, 256, w.K, w.N, 1 << 20});
  w.groups = ((w.axis ? w.K : w.N) - 1) / w.group_size + 1;
  if (!w.axis && r.chance(4)) w.groups += r.below(4);
  w.nbits = (int)r.choose<int64_t>({1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8});
  const int64_t bytes = (w.K + 7) / 8 * w.nbits;
  w.row_stride = bytes + (r.chance(4) ? r.below(70) : 0);
  w.qdata = random_bytes(r, b, (w.N - 1) * w.row_stride + bytes);
  const int64_t rows = w.axis ? w.N : w.groups, columns = w.axis ? w.groups : w.K;
  const auto any = [&] { return r.choose({DType::f32, DType::f16, DType::bf16, DType::u8, DType::u4}); };
  w.scale = random_values(r, b, any(), rows, columns, 0.01f, 0.1f);
  if (r.chance(3))
    w.table = random_table(r, b, w.nbits, w.N, digits);
  else
    w.zero = random_values(r, b, r.chance(2) ? w.scale.type : any(), rows, columns, 0, (float)((1 << w.nbits) - 1));
  return w;
}

}  // namespace hqqtensor
