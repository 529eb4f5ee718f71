// The table of kernels: one for each instruction set (dispatch/targets.h), all with the same functions. Plain C structs go in
// and out; nothing here knows torch.
#pragma once
#include <cstdint>

#include "dispatch/activations.h"
#include "dispatch/weight.h"

namespace hqqtensor {

// How linear_panel wants its activations, and for which numbers of rows of x (M) each kernel is the fastest.
struct PanelShape {
  Layout layout;                              // Layout::rows if there is no panel for this weight
  int tile;                                   // tokens of a tile; 0 if there is no panel
  int64_t max_rows_for_gemv;                  // M up to which linear_rows is the fastest kernel
  int64_t max_rows_for_integers;              // M up to which integer kernels beat linear_dense
  int64_t max_rows_unrounded = INT64_MAX;     // M up to which they beat it with numbers rounded to bf16 (Problem::rounded)
  int64_t max_rows_before_bytes = INT64_MAX;  // M up to which 8-bit activations are not for linear_dense (kByteActivations)
};

// The levels of a format for solvers: the numbers that codes stand for at scale 1. Either up to 16 levels in ascending order,
// where x belongs to the level before the first threshold that is not below x; or a floating-point format, which rounds to
// nearest even.
struct Levels {
  bool symmetric;        // for each level, its negative is a level too
  float first, last;     // the lowest and the highest level
  float values[16];      // the last level is repeated behind the others
  float thresholds[32];  // infinite behind the others
  uint8_t codes[16];
  int mantissa;  // bits of a floating-point format's mantissa; -1 for the levels above
  float least;   // the smallest number of a floating-point format that has a leading one
  int sign;      // the sign's bit in a code of a floating-point format
};

enum class Solver : int {
  rtn = 0,    // scale and zero point from the range of a group
  joint = 1,  // searches for the scale and zero point with the least squared error
};

// One token's queries against some tokens of a cache, for the heads that share one head of keys and values.
struct Attention {
  const float* q;  // [heads][dim], scaled; dim is a multiple of 16
  int64_t heads, dim;
  const void *keys, *values;  // [count][dim] of `type`
  DType type;
  int64_t count;
  const uint8_t* mask;  // [count], 0 for a token that is not seen; null where all are
  float softcap;        // scores s become softcap * tanh(s / softcap); 0: they stay
  float* scores;        // scratch memory, [heads][padded(count)]
  // [heads][dim + 2]: values weighted by exp(score - largest), the largest score, the sum of the weights. No token seen: a sum
  // of 0.
  float* out;
};

enum class GateFunction : int { silu = 0, gelu_tanh = 1 };

struct Kernels {
  const char* name;

  // ---- Quantizing activations ----

  // Row m of x, float32 [K], into row m of the quantized activations. False if x holds NaN, Inf or numbers too small.
  bool (*quantize_activations)(const float* x, const Weight&, int64_t m, const QuantizedActivations&);
  // The same for group g of an axis-0 weight, whose scales are multiplied into the activations.
  bool (*quantize_activations_axis0)(const float* x, const Weight&, int64_t g, int64_t m, const QuantizedActivations&);

  // ---- Products of integers ----

  // For few tokens. Columns [first, last) of y. axis 1: of one set of activations; axis 0: the columns of groups
  // [first, last), each with activations of its own, [last - first].
  void (*linear_rows)(const Problem&, const QuantizedActivations*, int64_t first, int64_t last, float* scratch);
  // Floats of scratch memory that linear_rows needs.
  int64_t (*linear_rows_scratch)(const Problem&, int64_t steps_per_row);

  // For several tokens and more. Columns first, first + step, ... of y before last, by panels of rows of the weight that are
  // transposed so that lanes are rows. Null where the instruction set has none, as are the next two.
  void (*linear_panel)(const Problem&, const QuantizedActivations&, int64_t first, int64_t last, int64_t step, float* scratch);
  PanelShape (*panel_shape)(const Weight&, int64_t M, int digits);
  // Floats of scratch memory that linear_panel needs.
  int64_t (*linear_panel_scratch)(const Problem&);

  // ---- Products of dense panels ----

  // Columns [first, last) of y through panels of the weight that are dequantized in cache. For axis 0 the columns are
  // positions in an order that each kernel chooses.
  void (*linear_dense)(const Problem&, const DenseActivations&, int64_t first, int64_t last, float* scratch);
  // Floats of scratch memory that linear_dense needs.
  int64_t (*linear_dense_scratch)(const Problem&);
  // Threads take multiples of so many columns of y.
  int64_t dense_row_multiple;

  // Columns [first, last) of all M tokens, before pack_activations, for kByteActivations alone.
  void (*plan_activations)(const DenseActivations&, int64_t M, int64_t first, int64_t last, int64_t K, float* out);
  // `first` is a multiple of it.
  int64_t plan_column_multiple;
  // Tokens [first, last) of M, all columns, into `out` in the order that linear_dense reads. False if it must read them as
  // they are. Null where it always does.
  bool (*pack_activations)(const DenseActivations&, int64_t M, int64_t first, int64_t last, int64_t K, float* out);
  // `first` is a multiple of it.
  int64_t pack_row_multiple;
  // Floats of `out` for all M tokens.
  int64_t (*packed_activations_size)(int64_t M, int64_t K, int splits);

  // ---- Dense weights ----

  // Row n of the weight into float32 [K].
  void (*dequantize_row)(const Weight&, int64_t n, float* out);
  // Rows [first, last) of the weight into [last - first, K] of a type, rows `stride` numbers apart. line: float32 [K].
  void (*dequantize_rows)(const Weight&, int64_t first, int64_t last, DType, char* out, int64_t stride, float* line);
  // `count` numbers of a type to float32, and back.
  void (*to_float)(const void* from, DType, int64_t count, float* out);
  void (*from_float)(const float* from, int64_t count, DType, void* out);

  // ---- What stands between the products of a decoder layer ----

  // out[i] = x[i] * weight[i] / sqrt(mean of x^2 + eps). x may be out.
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
  void (*attend)(const Attention&);
  // out[r]: the product of x, [dim], and row r of `rows`, [count][dim]. dim: a multiple of 16.
  void (*dot_rows)(const float* x, const float* rows, int64_t count, int64_t dim, float* out);
  // out[m * stride + r]: the product of row m of x, [M][dim], and row r of `rows`, [count][dim] of a type. dim: a multiple of
  // 16.
  void (*dense_rows)(const float* x, int64_t M, const void* rows, DType, int64_t count, int64_t dim, float* out,
                     int64_t stride);
  // out[i] = f(gate[i]) * up[i]. gate or up may be out.
  void (*gate)(GateFunction, const float* gate, const float* up, int64_t count, float* out);

  // ---- Solvers ----
  // A block is `lanes` groups of `size` weights, side by side: w[j * lanes + i] is weight j of group i. Where fewer groups
  // are left, the other lanes hold copies. inverse: 1 / scale. Both results are float32 [lanes].

  int lanes;
  // Smallest and largest of `count` numbers.
  void (*extremes)(const float* w, int64_t count, float* low, float* high);
  // Of `count` rows of K numbers, `stride` bytes apart: sums[k] grows by (w[k] * unit)^2 over the spread of the row, which is
  // the mean of (w[k] * unit)^2 * inverse_columns[k]; 1 for a row of zeros.
  void (*spread_rows)(const void* rows, DType, int64_t count, int64_t stride, int64_t K, float unit,
                      const float* inverse_columns, float* sums);
  // Scale and zero point of each group. Overwrites w.
  void (*solve_block)(Solver, float* w, int64_t size, int nbits, float* inverse, float* zero);
  // The joint solver; importance: [size], of sum 1, what the squared error of weight j of each group counts. Overwrites w.
  void (*solve_weighted_block)(float* w, const float* importance, int64_t size, int nbits, float* inverse, float* zero);
  // Codes of groups with scale and zero point given, [lanes]: the error of a weight is fed back into those after it by a row of
  // `upper`, [size, size] with rows `stride` numbers apart. codes, errors: float32, laid out as w. Overwrites w.
  void (*feed_back_block)(float* w, const float* upper, int64_t stride, int64_t size, int nbits, const float* scale,
                          const float* zero, float* codes, float* errors);
  // `rounds` of the published half-quadratic solver. totals[r] grows by the sum of |w - dequantized| of the first `count`
  // groups after round r.
  void (*hqq_block)(const float* w, int64_t size, int64_t count, int nbits, int rounds, float* inverse, float* zero,
                    double* totals);
  // Scales for given levels, which may be negative. Overwrites w.
  void (*solve_levels)(const Levels&, Solver, float* w, int64_t size, float* inverse);
  // One round of Lloyd's rule with up to 16 levels, over the first `count` groups: scale [lanes] becomes the best scale of
  // each group for its nearest codes, *error grows by the squared error before that, and top[16] and bottom[16] grow, by
  // code, by sums of scale * weight and of scale^2, whose quotients are the best levels.
  void (*lloyd_block)(const Levels&, const float* w, int64_t size, int64_t count, float* scale, double* error, double* top,
                      double* bottom);
  // Nearest codes of a row, float32 [K], packed into `out`. levels: null for the integers. inverse and zero: [groups] of this
  // row (axis 1) or [K] (axis 0).
  void (*assign_row)(const Levels* levels, const float* w, const float* inverse, const float* zero, int64_t K, int nbits,
                     int64_t group_size, int axis, uint8_t* out);
};

// The table in use: that of the first instruction set in dispatch/targets.h that the processor has, or of the one that the
// environment variable HQQTENSOR_CPU names. std::runtime_error if the processor lacks that one.
const Kernels& kernels();

}  // namespace hqqtensor
