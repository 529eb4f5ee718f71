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
      __builtin_memset(last[r], 0, sizeof(last[r]));  // the lanes behind the last one are converted too, and dropped
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

  // Columns [first, first + count) of all rows, whose values are codes: bytes, or nibbles of the block at `block`. SAME: the
  // rows are scaled by the same numbers, which are read once.
  template <int S, int Z, bool TABLE, Store STORE, bool SAME>
  void code_columns(const CodeRow* s, const CodeRow* z, int64_t block, int64_t first, int64_t count, const float* step,
                    const float* sums, float* const* to, Floats* total) const {
    const Floats units = f_set(unit), offset = f_set(w.table.offset * w.table.unit);
    const int64_t s_byte = S ? block / 2 : first, z_byte = Z ? block / 2 : first;
    const uint8_t *s_codes[kGemvRows], *z_codes[kGemvRows];
    float* out[kGemvRows];
    unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
      s_codes[r] = s[r].codes + s_byte, z_codes[r] = z[r].codes + z_byte, out[r] = to[r] + first;
    });
    step += first, sums += first;
    const auto add = [&](int64_t i, auto last) __attribute__((always_inline)) {
      constexpr bool LAST = decltype(last)::value;
      const int64_t left = count - i;
      const auto load = [&](const float* p) __attribute__((always_inline)) {
        return LAST ? f_load_some(p + first + i, left) : f_load(p + first + i);
      };
      const auto codes = [&](auto part, const uint8_t* p) __attribute__((always_inline)) {
        constexpr int PART = decltype(part)::value;
        return LAST ? f_codes_some<PART>(p + i, left) : f_codes<PART>(p + i);
      };
      const Floats steps = f_load(step + i), sum = f_load(sums + i);
      Floats s_zero, z_zero, by_scale, by_both;  // zero points of the codes; what differences to them are multiplied with
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
        if constexpr (!SAME || r == 0) {
          const Floats scale = load(s[r].scale);
          s_zero = load(s[r].zero);
          by_scale = STORE == Store::by_group ? f_mul(scale, steps) : scale;
          if constexpr (TABLE) {
            by_scale = f_mul(by_scale, units);
            by_both = f_mul(f_mul(scale, offset), sum);
          } else {
            z_zero = load(z[r].zero);
            by_both = f_mul(f_mul(scale, load(z[r].scale)), sum);
          }
        }
        const Floats a = f_sub(codes(std::integral_constant<int, S>(), s_codes[r]), s_zero);
        // What is stored behind the last belongs to the next columns, which come after.
        if constexpr (STORE != Store::none) f_store(out[r] + i, f_mul(a, by_scale));
        if constexpr (TABLE)
          total[r] = f_fnma(a, by_both, total[r]);
        else
          total[r] = f_fnma(f_mul(a, f_sub(codes(std::integral_constant<int, Z>(), z_codes[r]), z_zero)), by_both, total[r]);
      });
    };
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) add(i, std::false_type());
    if (i < count) add(i, std::true_type());
  }
  // Scales and zero points are both codes, of 8 or of 4 bits.
  template <bool TABLE, Store STORE, bool SAME>
  void from_codes(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    const bool s4 = w.scale.type == DType::u4, z4 = !TABLE && w.zero.type == DType::u4;
    const Values& zeros = TABLE ? w.scale : w.zero;
    for (int64_t t = 0; t < tokens; ++t) {
      const float *step = d.step + (token + t) * d.steps_per_row, *sums = d.sum + (token + t) * padded(w.groups);
      const auto with_rows = [&]<int... R>(std::integer_sequence<int, R...>) __attribute__((always_inline)) {
        const CodeRow s[] = {CodeRow(w.scale, rows[R])...}, z[] = {CodeRow(zeros, rows[R])...};
        float* const to[] = {out[R][t]...};
        Floats total[] = {start[R][t]...};
        const auto columns = [&]<int S, int Z>(std::integer_sequence<int, S, Z>, int64_t block, int64_t first, int64_t count) {
          code_columns<S, Z, TABLE, STORE, SAME>(s, z, block, first, count, step, sums, to, total);
        };
        if (!s4 && !z4) columns(std::integer_sequence<int, 0, 0>(), 0, 0, w.groups);
        for (int64_t block = 0; block < w.groups && (s4 || z4); block += 128) {
          const int64_t count = w.groups - block < 128 ? w.groups - block : 128, half = (count + 1) / 2;
          const auto both = [&]<int S, int Z>(std::integer_sequence<int, S, Z> low) {
            columns(low, block, block, half);
            columns(std::integer_sequence<int, 2 * S, 2 * Z>(), block, block + half, count - half);
          };
          if (s4 && z4)
            both(std::integer_sequence<int, 1, 1>());
          else if (s4)
            both(std::integer_sequence<int, 1, 0>());
          else
            both(std::integer_sequence<int, 0, 1>());
        }
        ((start[R][t] = total[R]), ...);
      };
      with_rows(std::make_integer_sequence<int, kGemvRows>());
    }
  }
  template <bool TABLE>
  void from_codes(const int64_t* rows, int64_t token, int64_t tokens, Out* out, Start* start) const {
    bool same = true;
    for (int r = 1; r < kGemvRows; ++r)
      for (const Values* v : {&w.scale, TABLE ? &w.scale : &w.zero}) same &= rows[r] % v->meta_rows == rows[0] % v->meta_rows;
    const auto with = [&]<Store STORE>(std::integral_constant<Store, STORE>) {
      if (same) return from_codes<TABLE, STORE, true>(rows, token, tokens, out, start);
      from_codes<TABLE, STORE, false>(rows, token, tokens, out, start);
    };
    if (quads) return with(std::integral_constant<Store, Store::quads>());
    if (by_group) return with(std::integral_constant<Store, Store::by_group>());
    with(std::integral_constant<Store, Store::none>());
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
