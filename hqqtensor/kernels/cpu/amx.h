// AMX: matrices in eight tile registers of up to 16 rows of 64 bytes, and products that add to a third of 16 x 16 numbers
// of 32 bits. Here the left one always has rows of the weight, the right one tokens: lanes of a result are tokens.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kTileRows = 16;

// Shapes of the eight tiles while in scope; with them the registers are lost. Nothing that another function may do to tiles,
// torch's own kernels say, holds between two scopes.
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
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
