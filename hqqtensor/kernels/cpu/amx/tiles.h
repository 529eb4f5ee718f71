// AMX: matrices in eight tile registers of up to 16 rows of 64 bytes, and products that add to a third of 16 x 16 numbers
// of 32 bits. Here the left one always has rows of the weight, the right one tokens: lanes of a result are tokens.
#pragma once
#include <cstdint>

#include "amx/target.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int kAmxTileRows = 16;

// Shapes of the eight tiles while in scope; with them the registers are lost. Other code, such as
// torch's own kernels, may reconfigure the tile registers, so every scope loads its configuration again and relies on nothing
// that was set before. (Assembly, here and below: the compiler's intrinsics take a register's number as a literal only, and do
// not tell the compiler what memory they read and write.)
class Tiles {
 public:
  // bytes: of a row; rows: how many.
  struct Shape {
    uint8_t rows;
    uint16_t bytes;
  };
  explicit Tiles(const Shape (&shapes)[8]) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, none[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = shapes[i].bytes;
      config.rows[i] = shapes[i].rows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
inline void tile_load(const void* from, int64_t stride = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void tile_store(void* to, int64_t stride = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
// TO += unsigned bytes of LEFT times signed bytes of RIGHT, by fours.
template <int TO, int LEFT, int RIGHT>
inline void tile_dot() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(LEFT), "i"(RIGHT));
}
// The same, both of them signed.
template <int TO, int LEFT, int RIGHT>
inline void tile_dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(LEFT), "i"(RIGHT));
}
// TO += bfloat16 of LEFT times those of RIGHT, by twos.
template <int TO, int LEFT, int RIGHT>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(LEFT), "i"(RIGHT));
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
