// Rows of up to 5 bits whose groups fill tiles, as bf16 splits (see amx/splits.h). The number of each code is split once for a
// group, into a table of 32 words for each split; codes then look their words up.
#pragma once
#include <array>

#include "amx/splits.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// What codes 0, 2, 4, ... and 1, 3, 5, ... stand for before scaling.
struct IntegerEntries {
  IntegerEntries(const Weight&, int64_t) {}
  static Floats number(int odd) {
    const __m512i i = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(i, _mm512_set1_epi32(odd)));
  }
  Floats operator()(int odd, Floats zero) const { return f_sub(number(odd), zero); }
};
struct TableEntries {
  Floats numbers[2];
  TableEntries(const Weight& w, int64_t n) {
    float all[32] = {};
    __builtin_memcpy(all, w.table.values + n * w.table.stride, sizeof(float) << w.nbits);
    for (int odd = 0; odd < 2; ++odd)
      numbers[odd] = _mm512_i32gather_ps(_mm512_cvtps_epi32(IntegerEntries::number(odd)), all, 4);
  }
  Floats operator()(int odd, Floats) const { return numbers[odd]; }
};

inline bool can_look_up(const Weight& w) {
  return w.axis == 1 && w.nbits <= 5 && (w.groups == 1 || w.group_size % kTileColumns == 0);
}

// As write_row.
template <int SPLITS, class Entries>
void look_up_row(const Weight& w, int64_t n, int64_t k, int64_t depth, const SliceValues&, const GroupValues& groups,
                 char* out) {
  static constexpr auto order = [] {  // lanes of the first 32 columns at even places, of the second at odd ones
    std::array<uint8_t, 64> places{};
    for (int i = 0; i < 64; ++i) places[i] = (uint8_t)(i / 4 + i / 2 % 2 * 16 + i % 2 * 32);
    return places;
  }();
  alignas(64) uint8_t codes[kSlice + 128];
  unpack_slice(w, n, k, depth, codes);
  const Entries entries(w, n);
  const __m512i places = _mm512_loadu_si512(order.data());
  __m512i splits[SPLITS], both{};
  int64_t end = groups.first * groups.size - k;  // of the group at hand
  for (int64_t i = 0, g = 0; i < depth; i += kTileColumns, out += SPLITS * kTileBytes) {
    if (i >= end) {
      const Floats s = f_set(groups.scale[g]), z = f_set(w.zero.data ? groups.zero[g] : 0.0f);
      split<SPLITS>(f_mul(entries(0, z), s), f_mul(entries(1, z), s), splits);
      ++g, end += groups.size;
    }
    both = i % 64 ? _mm512_srli_epi16(both, 8) : _mm512_permutexvar_epi8(places, _mm512_load_si512(codes + i));
    for (int part = 0; part < SPLITS; ++part)
      _mm512_store_si512(out + part * kTileBytes, _mm512_permutexvar_epi16(both, splits[part]));
  }
}

template <int SPLITS>
auto pick_row(const Weight& w) {
  if (can_look_up(w)) return w.table.values ? look_up_row<SPLITS, TableEntries> : look_up_row<SPLITS, IntegerEntries>;
  return !w.table.values ? write_row<SPLITS, Integers>
         : w.nbits <= 4  ? write_row<SPLITS, Entries16>
                         : write_row<SPLITS, Entries>;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
