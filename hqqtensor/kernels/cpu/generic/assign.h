// Nearest codes of rows of weights, packed.
#pragma once
#include <type_traits>

#include "generic/levels.h"
#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// Codes of one block of `count` (a multiple of 8, up to 128) into the plane of P bits that holds their bits from LOW on.
template <int P, int LOW>
inline uint8_t* pack_plane(const uint8_t* codes, int64_t count, uint8_t* out) {
  const int64_t width = count * P / 8;
  for (int64_t i = 0; i < width; ++i) {
    int byte = 0;
    for (int f = 0; f < 8 / P; ++f) byte |= ((codes[f * width + i] >> LOW) & ((1 << P) - 1)) << (P * f);
    out[i] = (uint8_t)byte;
  }
  return out + width;
}

template <int NB>
inline void pack_block(const uint8_t* codes, int64_t count, uint8_t* out) {
  if constexpr (NB == 8) out = pack_plane<8, 0>(codes, count, out);
  if constexpr ((NB & 4) != 0) out = pack_plane<4, 0>(codes, count, out);
  if constexpr ((NB & 2) != 0) out = pack_plane<2, NB & 4>(codes, count, out);
  if constexpr ((NB & 1) != 0) out = pack_plane<1, NB & 6>(codes, count, out);
}

// The same for a width that is known at run time.
__attribute__((noinline)) void pack_codes(const uint8_t* codes, int nbits, int64_t count, uint8_t* out) {
  with_nbits(nbits, [&](auto nb) {
    if (count == 128) return pack_block<nb.value>(codes, 128, out);
    pack_block<nb.value>(codes, count, out);
  });
}

// Codes of weights for given inverse scales and zero points.
struct IntegerCodes {
  Floats last;
  void operator()(Floats w, Floats s, Floats z, uint8_t* out) const {
    f_to_codes(f_min(f_max(f_round(f_add(f_mul(w, s), z)), f_zero()), last), out);
  }
};
template <class Nearest>
struct LevelCodes {
  const Nearest& nearest;
  void operator()(Floats w, Floats s, Floats, uint8_t* out) const { nearest.codes(f_mul(w, s), out); }
};

// The codes of up to 128 weights. axis 1: `left` weights remain of `group`. axis 0: a scale for each column.
template <class Find>
struct Assigner {
  const float *inverse, *zero;
  int64_t group_size, group, left;
  Find find;

  // s, z: scale and zero point of each of the `count` weights.
  void columns(const float* w, const float* s, const float* z, int64_t count, uint8_t* codes) const {
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) find(f_load(w + i), f_load(s + i), f_load(z + i), codes + i);
    if (i < count) {
      uint8_t rest[kFloats];
      find(f_load_some(w + i, count - i), f_load_some(s + i, count - i), f_load_some(z + i, count - i), rest);
      __builtin_memcpy(codes + i, rest, (size_t)(count - i));
    }
  }

  // The scales are spread out over their weights first, a whole vector at a time: the next group overwrites what is too much.
  void groups(const float* w, int64_t count, uint8_t* codes) {
    float s[128 + kFloats], z[128 + kFloats];
    for (int64_t i = 0; i < count;) {
      const int64_t end = count - i < left ? count : i + left;
      left -= end - i;
      const Floats scale = f_set(inverse[group]), shift = f_set(zero[group]);
      for (; i < end; i += kFloats) {
        f_store(s + i, scale);
        f_store(z + i, shift);
      }
      i = end;
      if (left == 0) ++group, left = group_size;
    }
    columns(w, s, z, count, codes);
  }
};

template <class Find>
void assign_with(const Find& find, const float* w, const float* inverse, const float* zero, int64_t K, int nbits,
                 int64_t group_size, int axis, uint8_t* out) {
  Assigner<Find> a{inverse, zero, group_size, 0, group_size, find};
  uint8_t codes[128];
  for (int64_t k = 0; k < K; k += 128, out += 16 * nbits) {
    const int64_t count = K - k < 128 ? K - k : 128;
    if (count < 128) __builtin_memset(codes, 0, sizeof codes);
    if (axis == 1)
      a.groups(w + k, count, codes);
    else
      a.columns(w + k, inverse + k, zero + k, count, codes);
    pack_codes(codes, nbits, (count + 7) / 8 * 8, out);
  }
}

// Nearest codes of a row of weights, packed. axis 1: a scale for each group; axis 0: one for each column.
void assign_row(const Levels* levels, const float* w, const float* inverse, const float* zero, int64_t K, int nbits,
                int64_t group_size, int axis, uint8_t* out) {
  if (levels == nullptr)
    return assign_with(IntegerCodes{f_set((float)((1 << nbits) - 1))}, w, inverse, zero, K, nbits, group_size, axis, out);
  // Levels have no zero points: what is read in their place is not used.
  with_levels(*levels, [&](const auto& nearest) {
    assign_with(LevelCodes<std::decay_t<decltype(nearest)>>{nearest}, w, inverse, inverse, K, nbits, group_size, axis, out);
  });
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
