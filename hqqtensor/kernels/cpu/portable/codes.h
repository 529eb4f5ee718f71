// Plain C++: chunks of 64 codes and their products with activations.
#pragma once
#include "portable/floats.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kGemvRows = 2, kGemvTokens = 1;
constexpr int kDenseTileRows = 4, kDenseTileTokens = 2;

struct Codes {
  uint8_t c[64];
};
struct Acc {
  float v[16];
};

constexpr int digit_shift(int) { return 8; }

template <int P, int L, int H>
inline void add_plane(const uint8_t* b, uint8_t* out) {
  constexpr int width = 16 * P, fields = 8 / P, mask = (1 << P) - 1;
  if constexpr (P == 8) {
    for (int i = 0; i < 64; ++i) out[i] = b[64 * H + i];
  } else {
    for (int f = 0; f < fields / 2; ++f)
      for (int i = 0; i < width; ++i) out[f * width + i] |= (uint8_t)(((b[i] >> (P * (f + H * fields / 2))) & mask) << L);
  }
}
template <int NB, int H>
inline Codes decode(const uint8_t* b) {
  Codes out{};
  if constexpr (NB == 8) add_plane<8, 0, H>(b, out.c);
  if constexpr ((NB & 4) != 0) add_plane<4, 0, H>(b, out.c);
  if constexpr ((NB & 2) != 0) add_plane<2, NB & 4, H>(b + 16 * (NB & 4), out.c);
  if constexpr ((NB & 1) != 0) add_plane<1, NB & 6, H>(b + 16 * (NB & 6), out.c);
  return out;
}
inline Codes load_codes(const uint8_t* p) {
  Codes c;
  std::memcpy(c.c, p, 64);
  return c;
}
inline void store_codes(uint8_t* p, const Codes& c) { std::memcpy(p, c.c, 64); }

struct ChunkDigits {
  const int8_t* p;
};
template <int D>
inline ChunkDigits load_chunk_digits(const int8_t* p) {
  return {p};
}
inline Codes lookup(const Codes& c, const uint8_t* table16) {
  Codes out;
  for (int i = 0; i < 64; ++i) out.c[i] = table16[c.c[i]];
  return out;
}
template <int NB, int D, int DW>
inline void dot(const Codes* c, const ChunkDigits& t, int32_t out[16]) {
  for (int i = 0; i < 16; ++i) out[i] = 0;
  for (int level = 0; level < (D > DW ? D : DW); ++level) {
    for (int i = 0; i < 16; ++i) out[i] *= DW > 1 ? 128 : 256;
    for (int d = 0; d < D; ++d) {
      if (level - d < 0 || level - d >= (DW ? DW : 1)) continue;
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) out[i] += (int32_t)c[level - d].c[4 * i + j] * t.p[64 * d + 4 * i + j];
    }
  }
}

template <int NB, int D, int DW>
inline void add_chunk(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scale) {
  int32_t s[16];
  dot<NB, D, DW>(c, t, s);
  for (int i = 0; i < 16; ++i) acc.v[i] += (float)s[i] * *scale;
}
struct LaneScales {
  int64_t group_size;
  explicit LaneScales(int64_t g) : group_size(g) {}
};
template <int NB, int D, int DW>
inline void add_chunk_lanes(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const LaneScales& l) {
  int32_t s[16];
  dot<NB, D, DW>(c, t, s);
  for (int i = 0; i < 16; ++i) acc.v[i] += (float)s[i] * scales[4 * i / l.group_size];
}
// Each quad of codes has a scale: `index` says which.
template <int NB, int D, int DW>
inline void add_chunk_quads(Acc& acc, const Codes* c, const ChunkDigits& t, const float* scales, const uint8_t* index,
                            float step) {
  int32_t s[16];
  dot<NB, D, DW>(c, t, s);
  for (int i = 0; i < 16; ++i) acc.v[i] += (float)s[i] * (scales[index[i]] * step);
}
inline float acc_sum(const Acc& a, const Floats& more) {
  float s = 0;
  for (float v : a.v) s += v;
  for (float v : more.v) s += v;
  return s;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
