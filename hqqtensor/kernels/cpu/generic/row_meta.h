// What linear_rows makes of scales and zero points, row by row, before it multiplies.
#pragma once
#include "generic/activations.h"
#include "generic/unrolled.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// Which scale each quad of codes takes, counted from the first of its chunk, or of its block where Pairs serve.
struct Quads {
  int64_t blocks;        // that Pairs take whole
  const int32_t* first;  // [blocks, then the chunks after them]: group of the first code
  const uint8_t* index;  // [blocks][2][16] in the order of Pairs, then [chunks][16]

  static int64_t bytes(const Weight& w) { return quad_rows(w) ? (w.K / 64 + 3) * 20 : 0; }
  Quads(const Weight& w, bool pairs, char* scratch) : blocks(pairs ? w.K / 128 : 0) {
    if (bytes(w) == 0) return;
    const int64_t size = w.group_size;
    int32_t* from = (int32_t*)scratch;
    uint8_t* to = (uint8_t*)(from + w.K / 64 + 3);
    first = from, index = to;
    int64_t group = 0, left = size / 4;  // quads of the group that are to come
    uint8_t own[32];                     // groups of the next quads, counted from *from
    const auto next = [&](int count) {
      *from = (int32_t)group;
      for (int i = 0; i < count; ++i) {
        own[i] = (uint8_t)(group - *from);
        if (--left == 0) ++group, left = size / 4;
      }
    };
    for (int64_t b = 0; b < blocks; ++b, ++from) {
      next(32);
      for (int v = 0; v < 2; ++v)  // even lanes: the first half's quads of its own and the next lane, odd ones the second's
        for (int i = 0; i < 16; ++i) *to++ = own[(i ^ v) + (i % 2 ? 16 : 0)];
    }
    for (int64_t k = 128 * blocks; k < w.K; k += 64, ++from, to += 16) {
      next(16);
      __builtin_memcpy(to, own, 16);
    }
  }
  int32_t chunk_first(int64_t chunk) const { return first[chunk - blocks]; }
  const uint8_t* chunk_index(int64_t chunk) const { return index + 16 * chunk; }
};

// Scales and zero points of the rows of a tile, for each of `tokens`: scale times step into out[r][t], an entry for each
// chunk (for each group where a chunk has several; where quads have scales, for each group and without the steps), and minus
// scale * zero * sum into the lanes of start[r][t].
struct RowMeta {
  const Weight& w;
  const QuantizedActivations& d;
  bool by_group, in_place, quads;
  float unit;
  float* scratch;  // 2 kGemvRows rows of values, padded with zeros

  using Out = float* [kGemvTokens];
  using Start = Floats[kGemvTokens];

  // What is stored of a scale: nothing, the scale times the step of its group, or the scale.
  enum class Store { none, by_group, quads };

  // Groups [first, last), whose values lie at s[r] and z[r]: whole vectors, or, where LAST, the start of one that may be read.
  template <DType T, bool TABLE, Store STORE, bool LAST>
  void blocks(const char* const* s, const char* const* z, int64_t first, int64_t last, int64_t token, int64_t tokens, Out* out,
              Start* start) const {
    const Floats units = f_set(unit), offset = f_set(w.table.offset * w.table.unit);
    const int64_t width = padded(w.groups);
    const Floats there = first_lanes(LAST ? last - first : kFloats);
    const auto value = [&](const char* p, int64_t i) __attribute__((always_inline)) {
      return LAST ? f_pick(there, load_as<T>(p, i), f_zero()) : load_as<T>(p, i);
    };
    for (int64_t t = 0; t < tokens; ++t) {
      const float *step = d.step + (token + t) * d.steps_per_row, *sums = d.sum + (token + t) * width;
      Floats total[kGemvRows];
      float* to[kGemvRows];
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) { total[r] = start[r][t], to[r] = out[r][t]; });
      for (int64_t g = first; g < last; g += kFloats)
        unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
          const Floats a = value(s[r], g - first);
          const Floats product = f_mul(a, TABLE ? offset : value(z[r], g - first));
          const Floats scaled = TABLE ? f_mul(a, units) : a;
          if constexpr (STORE == Store::quads) f_store(to[r] + g, scaled);
          if constexpr (STORE == Store::by_group) f_store(to[r] + g, f_mul(scaled, f_load(step + g)));
          total[r] = f_fnma(product, f_load(sums + g), total[r]);
        });
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) { start[r][t] = total[r]; });
    }
  }
  template <DType T, bool LAST>
  void blocks(const char* const* s, const char* const* z, int64_t first, int64_t last, int64_t token, int64_t tokens, Out* out,
              Start* start) const {
    const auto with = [&](auto table) __attribute__((always_inline)) {
      constexpr bool TABLE = decltype(table)::value;
      if (quads) return blocks<T, TABLE, Store::quads, LAST>(s, z, first, last, token, tokens, out, start);
      if (by_group) return blocks<T, TABLE, Store::by_group, LAST>(s, z, first, last, token, tokens, out, start);
      blocks<T, TABLE, Store::none, LAST>(s, z, first, last, token, tokens, out, start);
    };
    w.table.values ? with(std::true_type()) : with(std::false_type());
  }
  // Straight from memory: the values of a row are used once for each token.
  template <DType T>
  void direct(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    const int64_t whole = w.groups / kFloats * kFloats, size = size_of(T), left = (w.groups - whole) * size;
    const char *s[kGemvRows], *z[kGemvRows];
    for (int r = 0; r < kGemvRows; ++r) {
      s[r] = w.scale.row(rows[r]);
      z[r] = w.zero.data ? w.zero.row(rows[r]) : s[r];
    }
    if (whole) blocks<T, false>(s, z, 0, whole, token, tokens, out, start);
    if (left == 0) return;
    char last[kGemvRows][2][4 * kFloats];
    for (int r = 0; r < kGemvRows; ++r) {
      s[r] += whole * size, z[r] += whole * size;
      if (vector_fits(w.scale, rows[r], left) && (!w.zero.data || vector_fits(w.zero, rows[r], left))) continue;
      __builtin_memcpy(last[r][0], s[r], (size_t)left);
      __builtin_memcpy(last[r][1], z[r], (size_t)left);
      s[r] = last[r][0];
      z[r] = last[r][1];
    }
    blocks<T, true>(s, z, whole, w.groups, token, tokens, out, start);
  }
  // True if a vector may be read where the last `left` bytes of a row begin: rows after it have memory to its end.
  bool vector_fits(const Values& v, int64_t row, int64_t left) const {
    return v.stride > 0 && (w.N - 1 - row) * v.stride >= 4 * kFloats - left;
  }
  // Negative in the first `count` lanes only.
  static Floats first_lanes(int64_t count) {
    alignas(64) static constexpr struct Signs {
      float v[2 * kFloats];
      constexpr Signs() : v() {
        for (int i = 0; i < 2 * kFloats; ++i) v[i] = i < kFloats ? -1.0f : 1.0f;
      }
    } signs;
    return f_load(signs.v + kFloats - count);
  }

  // Columns [first, first + count) of one row whose values are codes: bytes, or nibbles of the block at `block`.
  template <int S, int Z, bool TABLE>
  void codes(const CodeRow& s, const CodeRow& z, int64_t block, int64_t first, int64_t count, int64_t token, int64_t tokens,
             float* const* out, Floats* start) const {
    const Floats units = f_set(unit), offset = f_set(w.table.offset * w.table.unit);
    const int64_t width = padded(w.groups), byte = block / 2, s_byte = S ? byte : first, z_byte = Z ? byte : first;
    Floats total[kGemvTokens];
    for (int64_t t = 0; t < tokens; ++t) total[t] = start[t];
    const auto step = [&](int64_t i, auto last) __attribute__((always_inline)) {
      constexpr bool LAST = decltype(last)::value;
      const Floats a = s.load<S, LAST>(s_byte + i, first + i, count - i);
      const Floats product = f_mul(a, TABLE ? offset : z.load<Z, LAST>(z_byte + i, first + i, count - i));
      const Floats scaled = TABLE ? f_mul(a, units) : a;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t g = first + i;  // what is stored behind the last belongs to the next columns, which come after
        if (quads)
          f_store(out[t] + g, scaled);
        else if (by_group)
          f_store(out[t] + g, f_mul(scaled, f_load(d.step + (token + t) * d.steps_per_row + g)));
        total[t] = f_fnma(product, f_load(d.sum + (token + t) * width + g), total[t]);
      }
    };
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) step(i, std::false_type());
    if (i < count) step(i, std::true_type());
    for (int64_t t = 0; t < tokens; ++t) start[t] = total[t];
  }
  // Scales and zero points are both codes, of 8 or of 4 bits.
  template <bool TABLE>
  void from_codes(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    const bool s4 = w.scale.type == DType::u4, z4 = !TABLE && w.zero.type == DType::u4;
    for (int r = 0; r < kGemvRows; ++r) {
      const CodeRow s(w.scale, rows[r]), z(TABLE ? w.scale : w.zero, rows[r]);
      if (!s4 && !z4) {
        codes<0, 0, TABLE>(s, z, 0, 0, w.groups, token, tokens, out[r], start[r]);
        continue;
      }
      for (int64_t block = 0; block < w.groups; block += 128) {
        const int64_t count = w.groups - block < 128 ? w.groups - block : 128, half = (count + 1) / 2;
        const auto both = [&](auto s_nibbles, auto z_nibbles) {
          constexpr int S = decltype(s_nibbles)::value, Z = decltype(z_nibbles)::value;
          codes<S, Z, TABLE>(s, z, block, block, half, token, tokens, out[r], start[r]);
          codes<2 * S, 2 * Z, TABLE>(s, z, block, block + half, count - half, token, tokens, out[r], start[r]);
        };
        if (s4 && z4)
          both(std::true_type(), std::true_type());
        else if (s4)
          both(std::true_type(), std::false_type());
        else
          both(std::false_type(), std::true_type());
      }
    }
  }

  void run(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    for (int r = 0; r < kGemvRows; ++r)
      for (int64_t t = 0; t < tokens; ++t) start[r][t] = f_zero();
    if (w.scale.quantized() && w.table.values) {
      from_codes<true>(rows, token, tokens, out, start);
    } else if (w.scale.quantized() && w.zero.quantized()) {
      from_codes<false>(rows, token, tokens, out, start);
    } else if (w.scale.quantized() || (w.zero.data && w.zero.type != w.scale.type)) {
      const char *s[kGemvRows], *z[kGemvRows];
      for (int r = 0; r < kGemvRows; ++r) {
        float *scale = scratch + 2 * r * padded(w.groups), *zero = scale + padded(w.groups);
        load_values(w.scale, rows[r], 0, w.groups, scale);
        if (w.zero.data) load_values(w.zero, rows[r], 0, w.groups, zero);
        s[r] = (const char*)scale;
        z[r] = (const char*)zero;
      }
      blocks<DType::f32, false>(s, z, 0, w.groups, token, tokens, out, start);
    } else if (w.scale.type == DType::f16) {
      direct<DType::f16>(rows, token, tokens, out, start);
    } else if (w.scale.type == DType::bf16) {
      direct<DType::bf16>(rows, token, tokens, out, start);
    } else {
      direct<DType::f32>(rows, token, tokens, out, start);
    }
    if (quads || (by_group && w.group_size <= 64)) return;
    for (int r = 0; r < kGemvRows; ++r) {
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
          f_store(out[t] + c, f_mul(v, f_load(d.step + (token + t) * d.steps_per_row + c)));
    }
  }
};

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
