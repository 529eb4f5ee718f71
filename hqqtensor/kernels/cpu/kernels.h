// What the kernels take and give: plain C structs, no torch. One table of functions per instruction set.
#pragma once
#include <cstdint>

namespace hqqtensor {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Packed weight [N, K]. axis 1: scale and zero [N, groups], column k in group k / group_size.
// axis 0: scale and zero [groups, K], row n in group n % groups.
struct Weight {
  const uint8_t* qdata;
  int64_t row_stride;  // bytes from a row to the next
  const void* scale;
  const void* zero;
  DType meta;
  int64_t meta_stride;  // elements from a row of scale (and zero) to the next
  int64_t N, K, groups, group_size;
  int nbits, axis;
};

// Activations [M, K] and result [M, N]; bias [N] float32 or null; pre_scale [K] float32 or null.
struct Problem {
  Weight w;
  const void* x;
  int64_t x_stride, M;
  DType x_type;
  const float* bias;
  const float* pre_scale;
  void* y;  // of x_type, rows of N
};

// Activations as integers: x = step * sum_d digit_d * 2^(shift * (count - 1 - d)), chunk by chunk of 64.
struct Digits {
  int8_t* digits;   // [M][chunks][count][64]
  float* step;      // [M][entries], an entry for each group or each chunk: see step_entries
  float* sum;       // [M][padded(groups)]: sum of x over each group (axis 1 alone)
  int64_t chunks, entries;
  int count;        // 3: as exact as float32 sums; 2: finer than 16-bit floats; 1: 8-bit activations
};

struct Kernels {
  const char* name;
  // Rows [first, last) of the result, from prepared activations (axis 1).
  void (*linear_small)(const Problem&, const Digits&, int64_t first, int64_t last, float* scratch);
  int64_t (*linear_small_scratch)(const Problem&);  // floats
  // Groups [first, last) of rows of an axis-0 weight, activations prepared for each group in `scratch`.
  void (*linear_small_axis0)(const Problem&, int digits, int64_t first, int64_t last, char* scratch);
  int64_t (*linear_small_axis0_scratch)(const Problem&, int digits);  // bytes
  // Rows [first, last) through dense panels in cache; x32 float32 [M, x32_stride].
  void (*linear_large)(const Problem&, const float* x32, int64_t x32_stride, int64_t first, int64_t last, float* scratch);
  int64_t (*linear_large_scratch)(const Problem&);  // floats
  // Row m of the activations as integers; false where they hold NaN, Inf or numbers too small for that.
  bool (*prepare)(const float* x, const Weight&, int64_t m, const Digits&);
  // Row n of the dense weight, float32, K numbers.
  void (*dequantize_row)(const Weight&, int64_t n, float* out);
  int lanes;  // groups that solve_block works on together
  void (*solve_block)(int solver, float* w, int64_t size, int nbits, float* inverse, float* zero);
  void (*assign_row)(const float* w, const float* inverse, const float* zero, int64_t K, int nbits, int64_t group_size,
                     int axis, uint8_t* out);
  void (*to_float)(const void* from, DType, int64_t count, float* out);
  void (*from_float)(const float* from, int64_t count, DType, void* out);
};

// The table in use: the best that the processor has, or what HQQTENSOR_CPU names (an error where it lacks that).
const Kernels& kernels();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// True where groups line up with the 4 codes of a 32-bit lane, or the 64 of a chunk: what linear_small needs.
inline bool lane_groups(const Weight& w) {
  return w.axis == 0 || w.groups == 1 || w.group_size % 64 == 0 || (w.group_size % 4 == 0 && 64 % w.group_size == 0);
}

// Room for vectors to run past the end.
inline int64_t padded(int64_t count) { return (count + 47) / 16 * 16; }

// Groups of up to 128 have one step for each group, so that a row's scales and the steps multiply entry by entry.
inline bool step_per_group(const Weight& w) { return w.axis == 1 && w.groups > 1 && w.group_size <= 128; }
inline int64_t step_entries(const Weight& w) { return padded(step_per_group(w) ? w.groups : (w.K + 63) / 64); }

}  // namespace hqqtensor
