// What the kernels take and give: plain C structs, no torch. One table of functions per instruction set.
#pragma once
#include <cstdint>

namespace hqqtensor {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, u8 = 3, u4 = 4 };  // u4: two to a byte, only within Values
inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2; }
// Bytes of a row of `columns` numbers of 4 bits: blocks of 128, the last one as short as it is; code c of a block of B lies
// in byte c % h, nibble c / h, h = ceil(B / 2).
inline int64_t nibble_bytes(int64_t columns) { return (columns + 1) / 2; }

// Scales or zero points, a matrix. Those of 8 or 4 bits are themselves quantized: row r reads (value - own_zero) * own_scale
// with row r % own_rows of these.
struct Values {
  const void* data;  // null: none
  DType type;
  int64_t columns, stride;  // bytes from a row to the next
  const float *own_scale, *own_zero;
  int64_t own_rows, own_stride;

  bool quantized() const { return own_scale != nullptr; }
  const char* row(int64_t r) const { return (const char*)data + r * stride; }
  int64_t row_bytes() const { return type == DType::u4 ? nibble_bytes(columns) : columns * size_of(type); }
};

// What a code stands for besides itself: values[code], float32, 2^nbits of them, `stride` from a row's table to the next
// (0: one for all rows). For kernels that multiply integers the same as digits in base 2^shift, highest first,
//   values[code] = unit * (sum_d digits[d][code] * 2^(shift * (count - 1 - d)) - offset).
struct Table {
  const float* values;  // null: the codes are the numbers
  int64_t stride;
  int count;  // 0: no digits; 1: exact
  float unit, offset;
  alignas(16) uint8_t digits[3][16];
};

// Packed weight [N, K]. axis 1: scale and zero [N, groups], column k in group k / group_size.
// axis 0: scale and zero [groups, K], row n in group n % groups.
struct Weight {
  const uint8_t* qdata;
  int64_t row_stride;  // bytes from a row to the next
  Values scale, zero;
  Table table;
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
  void* y;  // of x_type, rows of y_stride
  int64_t y_stride;
};

// Activations as integers: x = step * sum_d digit_d * 2^(shift * (count - 1 - d)), chunk by chunk of 64.
struct Digits {
  int8_t* digits;   // [M][chunks][count][64], whole blocks in the order of Wide or Pairs where those serve; or by
                    // tiles of `tile` tokens (the last has those left over), each [16 chunks][tokens of the tile][count][4],
                    // or, apart, [chunks][count][16][tokens of the tile][4]
  float* step;      // [M][entries], an entry for each group or each chunk: see step_entries
  float* sum;       // [M][padded(groups)]: sum of x over each group (axis 1), or of zero * x over all (axis 0)
  int64_t M, chunks, entries;
  int count;        // 3: as exact as float32 sums; 2: finer than 16-bit floats; 1: 8-bit activations
  int tile;         // 0: no tiles
  bool wide;        // in tiles: one integer of 16 bits instead of `count` digits
  bool apart;       // in tiles: the digits of a chunk one after the other, not side by side

  int64_t bytes() const { return wide ? 2 : count; }  // of an activation

  struct Place {
    int8_t* at;        // first digit of token m, column 0
    int64_t by_digit;  // bytes to the next digit of the same column; 0: integers of 16 bits
    int64_t by_quad;   // to the next 4 columns of a chunk
    int64_t by_chunk;  // to the next chunk
  };
  Place place(int64_t m) const {
    if (tile == 0) return {digits + m * chunks * count * 64, 64, 4, count * 64};
    const int64_t first = m / tile * tile, tokens = M - first < tile ? M - first : tile, each = apart ? 1 : bytes();
    return {digits + first * chunks * bytes() * 64 + (m - first) * each * 4, apart ? tokens * 64 : wide ? 0 : 4,
            tokens * each * 4, tokens * bytes() * 64};
  }
};

// The numbers that codes stand for at scale 1, for solvers. Either up to 16 of them, ascending, the number x belonging to
// the level before the first threshold that is not below x; or a floating-point format, nearest to even.
struct Levels {
  bool symmetric;           // every level's negative is a level
  float first, last;
  float values[16];         // the last is repeated in places left over
  float thresholds[32];     // infinite in places left over
  uint8_t codes[16];
  int mantissa;             // bits; -1: the levels above
  float least;              // the smallest number with a leading one
  int sign;                 // the sign's bit in a code
};

// How linear_panel wants its activations, and between which rows of x it is the fastest (docs/performance.md).
struct PanelShape {
  int tile;  // tokens of a tile; 0: no panel serves
  bool wide, apart;  // of Digits
  int64_t row_tokens;    // up to here linear_rows is
  int64_t integer_tokens;  // up to here integers are, above linear_dense
};

// Activations for linear_dense: float32 [M, stride], and what pack_tokens made of them.
struct DenseTokens {
  const float* x;
  int64_t stride;
  int parts;            // numbers of bfloat16's precision that add up to each: 1 exactly, 2 finer than 16-bit floats, 3 float32
  const float* packed;  // null: there is no pack_tokens, or it refused
};

struct Kernels {
  const char* name;
  // Row m of float32 activations as integers; false where they hold NaN, Inf or numbers too small for that.
  bool (*prepare)(const float* x, const Weight&, int64_t m, const Digits&);
  // The same for group g of an axis-0 weight, whose scales belong to the activations.
  bool (*prepare_axis0)(const float* x, const Weight&, int64_t g, int64_t m, const Digits&);
  // Rows [first, last) of the result for few tokens: every row is read by itself. axis 0: the rows of groups [first, last),
  // each with its own digits.
  void (*linear_rows)(const Problem&, const Digits*, int64_t first, int64_t last, float* scratch);
  int64_t (*linear_rows_scratch)(const Problem&, int64_t entries);  // floats
  // Rows first, first + step, ... before last for several tokens and more: panels of rows, turned so that lanes are rows.
  // Null where there is none.
  void (*linear_panel)(const Problem&, const Digits&, int64_t first, int64_t last, int64_t step, float* scratch);
  PanelShape (*panel_shape)(const Weight&, int64_t M, int digits);
  int64_t (*linear_panel_scratch)(const Problem&);  // floats
  // Rows [first, last) through dense panels in cache. axis 0: in an order of the kernel's own.
  void (*linear_dense)(const Problem&, const DenseTokens&, int64_t first, int64_t last, float* scratch);
  int64_t (*linear_dense_scratch)(const Problem&);  // floats
  // Some tokens, all columns, in an order that linear_dense knows; false where it must take them as they lie. Null where it
  // always does.
  bool (*pack_tokens)(const DenseTokens&, int64_t first, int64_t last, int64_t K, float* out);
  int64_t pack_step;   // `first` is a multiple of it
  int64_t dense_step;  // rows that threads share out whole
  int64_t (*packed_size)(int64_t M, int64_t K, int parts);  // floats
  // Row n of the dense weight, float32, K numbers.
  void (*dequantize_row)(const Weight&, int64_t n, float* out);
  // Rows [first, last) of the dense weight as numbers of a type, rows `stride` numbers apart; `line`: room for K floats.
  void (*dequantize_rows)(const Weight&, int64_t first, int64_t last, DType, char* out, int64_t stride, float* line);
  int lanes;  // groups that solve_block works on together
  void (*extremes)(const float* w, int64_t count, float* low, float* high);
  void (*solve_block)(int solver, float* w, int64_t size, int nbits, float* inverse, float* zero);
  // `rounds` of the published solver on `count` groups (the other lanes hold copies); totals[r] gains the sum of
  // |w - dequantized| of round r.
  void (*hqq_block)(const float* w, int64_t size, int64_t count, int nbits, int rounds, float* inverse, float* zero,
                    double* totals);
  // Scales for given levels, which may be negative. solver: 0 rtn, 1 joint.
  void (*solve_levels)(const Levels&, int solver, float* w, int64_t size, float* inverse);
  // For up to 16 levels: the error of each group's scale, the best scale for its codes, and with that the sums by code
  // over `count` groups (the other lanes hold copies) that give the best levels: of scale * weight and of scale^2.
  void (*lloyd_block)(const Levels&, const float* w, int64_t size, int64_t count, float* scale, double* error, double* top,
                      double* bottom);
  // Nearest codes of a row, packed; levels null: the integers.
  void (*assign_row)(const Levels* levels, const float* w, const float* inverse, const float* zero, int64_t K, int nbits,
                     int64_t group_size, int axis, uint8_t* out);
  void (*to_float)(const void* from, DType, int64_t count, float* out);
  void (*from_float)(const float* from, int64_t count, DType, void* out);
};

// The table in use: the best that the processor has, or what HQQTENSOR_CPU names (an error where it lacks that).
const Kernels& kernels();
const Kernels* kernels_amx();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// True where the integer kernels serve: activations are grouped by lanes of 4 codes, tables have digits.
inline bool quad_groups(const Weight& w) { return w.axis == 0 || w.groups == 1 || w.group_size % 4 == 0; }
inline bool integer_codes(const Weight& w) { return w.table.values == nullptr || w.table.count > 0; }
// True where groups line up with the 64 codes of a chunk as well: what linear_rows needs.
inline bool chunk_groups(const Weight& w) {
  return w.axis == 0 || w.groups == 1 || w.group_size % 64 == 0 || (w.group_size % 8 == 0 && 64 % w.group_size == 0);
}

// Groups of whole quads of codes, few enough for the scales of a chunk (of 128 codes) to fit a vector: what linear_rows
// takes besides, a scale for each quad.
inline bool quad_rows(const Weight& w) {
  return w.axis == 1 && w.groups > 1 && w.group_size % 4 == 0 && w.group_size >= 12 && !chunk_groups(w);
}

// Integers cost more for axis 0, whose groups each make their own of the activations, and for float32 times tables of several
// digits.
inline bool dear(const Weight& w, int digits) { return (w.axis == 0 && digits > 1) || (w.table.count > 1 && digits == 3); }

// Room for vectors to run past the end.
inline int64_t padded(int64_t count) { return (count + 47) / 16 * 16; }

// Where chunks and groups line up, groups of up to 128 have one step each, so that a row's scales and the steps multiply
// entry by entry. Elsewhere a chunk has one.
inline bool step_per_group(const Weight& w) {
  return w.axis == 1 && w.groups > 1 && w.group_size <= 128 && chunk_groups(w);
}
inline int64_t step_entries(const Weight& w) { return padded(step_per_group(w) ? w.groups : (w.K + 63) / 64); }
// Entry of a chunk's step (of its first group's where it has several, which are equal).
inline int64_t step_index(const Weight& w, int64_t chunk) {
  if (!step_per_group(w)) return chunk;
  return w.group_size == 128 ? chunk / 2 : chunk * (64 / w.group_size);
}

}  // namespace hqqtensor
