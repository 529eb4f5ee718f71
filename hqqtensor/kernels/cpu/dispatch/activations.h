// The activations as the kernels see them: as they come, quantized to integers, and dense.
#pragma once
#include <cstdint>

#include "dispatch/weight.h"

namespace hqqtensor {

// One product y = x W^T + bias.
struct Problem {
  Weight w;
  const void* x;     // [M, K] of x_type
  int64_t x_stride;  // numbers from a row of x to the next
  int64_t M;
  DType x_type;
  const float* bias;       // [N] or null
  const float* pre_scale;  // [K] or null: x is multiplied by it first
  void* y;                 // [M, N] of x_type
  int64_t y_stride;        // numbers from a row of y to the next
  bool rounded = false;  // of bf16 x: weights, and x times pre_scale, may be rounded to bf16 once, as a dense product has them
};

// The order in which quantized activations lie in memory. A row of x is a token; 4 neighbouring columns are a quad, 64 a
// chunk. Tiles are `tile` tokens that a kernel multiplies together; the last one has those left over.
enum class Layout {
  rows,            // [M][chunks][count][64]                          for linear_rows, which may reorder whole blocks
  tiles,           // tiles of [K / 4 quads][tokens][count][4]
  tiles_int16,     // tiles of [K / 4 quads][tokens][4] int16_t       one integer of 16 bits in place of digits
  tiles_by_digit,  // tiles of [chunks][count][16 quads][tokens][4]
};

// Activations quantized to integers, chunk by chunk of 64 columns. An integer has one to three digits in base 2^shift, which
// are signed bytes, the highest digit first:
//   x = step * sum_d digit_d * 2^(shift * (count - 1 - d))
struct QuantizedActivations {
  int8_t* digits;  // in the order of `layout`
  float* step;     // [M][steps_per_row]: one for each group or for each chunk, see step_per_group
  float* sum;      // [M][padded(groups)]: sum of x over each group (axis 1), or of zero * x over all columns (axis 0)
  int64_t M;
  int64_t chunks;  // of a row
  int64_t steps_per_row;
  int count;  // digits: 3 are as exact as float32 sums, 2 finer than 16-bit floats, 1 is for 8-bit activations
  int tile;   // tokens of a tile; 0 for Layout::rows
  Layout layout;

  // Bytes of one activation.
  int64_t bytes() const { return layout == Layout::tiles_int16 ? 2 : count; }

  // Where the digits of one token lie.
  struct Token {
    int8_t* data;          // first digit of column 0
    int64_t digit_stride;  // bytes to the next digit of the same column; 0 for integers of 16 bits
    int64_t quad_stride;   // bytes to the next quad of the same chunk
    int64_t chunk_stride;  // bytes to the next chunk
  };
  Token token(int64_t m) const {
    if (layout == Layout::rows) return {digits + m * chunks * count * 64, 64, 4, count * 64};
    const bool by_digit = layout == Layout::tiles_by_digit;
    const int64_t first = m / tile * tile, tokens = M - first < tile ? M - first : tile;
    const int64_t together = by_digit ? 1 : bytes();  // bytes of an activation that lie side by side
    return {digits + first * chunks * bytes() * 64 + (m - first) * together * 4,
            by_digit                        ? tokens * 64
            : layout == Layout::tiles_int16 ? 0
                                            : 4,
            tokens * together * 4, tokens * bytes() * 64};
  }
};

// Activations are integers of 8 bits, and so are weights: each with a step for hundreds of columns.
constexpr int kByteActivations = 0;

// Activations for linear_dense, and what pack_activations made of them.
struct DenseActivations {
  const float* x;       // [M, K]
  int64_t stride;       // numbers from a row to the next
  int splits;           // bf16 numbers that add up to each: 1 is exact already, 2 are finer than 16-bit floats, 3 are float32;
                        // or kByteActivations
  const float* packed;  // null if the kernels have no pack_activations, or it refused
};

}  // namespace hqqtensor
