// Rotation by Sylvester's Hadamard matrix, which is symmetric and, divided by the root of its length, its own inverse.
#pragma once
#include <cmath>
#include <cstdint>

namespace hqqtensor {

// Each run of `block` numbers of x, [count], in place. block: a power of two that divides count.
inline void rotate(float* x, int64_t count, int64_t block) {
  const float unit = 1 / std::sqrt((float)block);
  for (float* const end = x + count; x < end; x += block) {
    for (int64_t size = 1; size < block; size *= 2)
      for (int64_t first = 0; first < block; first += 2 * size)
        for (int64_t i = first; i < first + size; ++i) {
          const float even = x[i], odd = x[i + size];
          x[i] = even + odd, x[i + size] = even - odd;
        }
    for (int64_t i = 0; i < block; ++i) x[i] *= unit;
  }
}

}  // namespace hqqtensor
