// Rows of up to 5 bits whose groups fill tiles, as bf16 splits (see amx/splits.h). The number of each code is split once for a
// group, into a table of 32 words for each split; codes then look their words up.
#pragma once
#include <array>

#include "amx/splits.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// What codes 0 to 15, and 16 to 31, stand for before scaling.
struct IntegerEntries {
  IntegerEntries(const Weight&, int64_t) {}
  Floats operator()(int half, Floats zero) const {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return f_sub(_mm512_cvtepi32_ps(_mm512_add_epi32(i, _mm512_set1_epi32(16 * half))), zero);
  }
};
struct TableEntries {
  Floats numbers[2];
  TableEntries(const Weight& w, int64_t n) {
    float all[32] = {};
    __builtin_memcpy(all, w.table.values + n * w.table.stride, sizeof(float) << w.nbits);
    for (int half = 0; half < 2; ++half) numbers[half] = f_load(all + 16 * half);
  }
  Floats operator()(int half, Floats) const { return numbers[half]; }
};

inline bool can_look_up(const Weight& w) {
  return w.axis == 1 && w.nbits <= 5 && (w.groups == 1 || w.group_size % kTileColumns == 0);
}

// As write_row.
template <int SPLITS, class Entries>
void look_up_row(const Weight& w, int64_t n, int64_t k, int64_t depth, const SliceValues&, const GroupValues& groups,
                 char* out) {
  static constexpr auto order = [] {  // words of the first 32 columns, with those of the next 32 in their upper halves
    std::array<uint8_t, 64> places{};
    for (int i = 0; i < 64; ++i) places[i] = (uint8_t)(i / 2 + i % 2 * 32);
    return places;
  }();
  alignas(64) uint8_t codes[kSlice + 128];
  unpack_slice(w, n, k, depth, codes);
  const Entries entries(w, n);
  const __m512i places = _mm512_loadu_si512(order.data());
  const float *scale = groups.scale, *zero = w.zero.data ? groups.zero : nullptr;
  const bool wide = w.nbits == 5;
  __m512i splits[SPLITS], both{};
  int64_t end = groups.first * groups.size - k;  // of the group at hand
  for (int64_t i = 0; i < depth; i += kTileColumns, out += SPLITS * kTileBytes) {
    if (i >= end) {
      const Floats s = f_set(*scale++), z = zero ? f_set(*zero++) : f_zero(), low = f_mul(entries(0, z), s);
      split<SPLITS>(low, wide ? f_mul(entries(1, z), s) : low, splits);
      end += groups.size;
    }
    both = i % 64 ? _mm512_srli_epi16(both, 8) : _mm512_permutexvar_epi8(places, _mm512_load_si512(codes + i));
    for (int part = 0; part < SPLITS; ++part)
      _mm512_store_si512(out + part * kTileBytes, _mm512_permutexvar_epi16(both, splits[part]));
  }
}

// What writes columns of a row into a panel, as write_row does.
using PutRow = void (*)(const Weight&, int64_t, int64_t, int64_t, const SliceValues&, const GroupValues&, char*);
template <int SPLITS>
PutRow pick_row(const Weight& w) {
  if (can_look_up(w)) return w.table.values ? look_up_row<SPLITS, TableEntries> : look_up_row<SPLITS, IntegerEntries>;
  return !w.table.values ? write_row<SPLITS, Integers>
         : w.nbits <= 4  ? write_row<SPLITS, Entries16>
                         : write_row<SPLITS, Entries>;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
