// A packed weight as the kernels see it, in plain C structs.
#pragma once
#include <cstdint>

namespace hqqtensor {

// The type of stored numbers. u4 packs two of them into a byte and occurs in Values only.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, u8 = 3, u4 = 4 };

// Bytes of one number. DType::u4 has no whole number of them: see nibble_bytes.
inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2; }

// Bytes of a row of `columns` numbers of 4 bits. The row is a run of blocks of 128 numbers; the last block has those left
// over. With h = ceil(B / 2), byte i of a block of B numbers holds
//   bits 0..3  number i            i = 0 .. h - 1
//   bits 4..7  number i + h        (none in the last byte where B is odd)
inline int64_t nibble_bytes(int64_t columns) { return (columns + 1) / 2; }

// A matrix of scales or of zero points. Numbers of 8 or 4 bits are themselves quantized, by a second level of scales and zero
// points: number c of row r is (stored - meta_zero[r % meta_rows][c]) * meta_scale[r % meta_rows][c].
struct Values {
  const void* data;  // [rows][columns] of `type`; null where the format has none
  DType type;
  int64_t columns;
  int64_t stride;           // bytes from a row to the next
  const float* meta_scale;  // [meta_rows][columns]; null where the numbers are not quantized
  const float* meta_zero;   // [meta_rows][columns]
  int64_t meta_rows;
  int64_t meta_stride;  // numbers from a row of meta_scale or meta_zero to the next

  bool quantized() const { return meta_scale != nullptr; }
  const char* row(int64_t r) const { return (const char*)data + r * stride; }
  int64_t row_bytes() const { return type == DType::u4 ? nibble_bytes(columns) : columns * size_of(type); }
};

// The numbers that codes stand for where these are not the codes themselves: number c is values[c].
//
// Kernels that multiply integers use the same numbers as one to three digits in base 2^shift, the highest digit first:
//   values[c] = unit * (sum_d digits[d][c] * 2^(shift * (count - 1 - d)) - offset)
struct Table {
  const float* values;  // [2^nbits], or a row of them for each row of the weight; null where codes are the numbers
  int64_t stride;       // numbers from the table of a row to that of the next; 0 where all rows share one table
  int count;            // digits of a number: 0 if there are none, 1 if they are exact
  float unit;
  float offset;
  alignas(16) uint8_t digits[3][16];
};

// A packed weight [N, K]. A row is a run of blocks of 128 codes, the last one shorter. A block has planes of 4, 2 and 1 bits
// that add up to the width (8 bits are one plane), the lowest bits of the codes first:
//   4 bits, 64 bytes: byte i holds     3 bits, 32 + 16 bytes: byte i of the first 32 and of the next 16 hold
//     bits 0..3  code i                  bits 2 f, 2 f + 1  bits 0, 1 of code i + 32 f     f = 0..3
//     bits 4..7  code i + 64             bit f              bit 2 of code i + 16 f         f = 0..7
//   axis 1: scale and zero are [N, groups];  column k belongs to group k / group_size
//   axis 0: scale and zero are [groups, K];  row n belongs to group n % groups
struct Weight {
  const uint8_t* qdata;  // N rows of packed codes
  int64_t row_stride;    // bytes from a row of qdata to the next
  Values scale;
  Values zero;
  Table table;
  int64_t N;
  int64_t K;
  int64_t groups;
  int64_t group_size;
  int nbits;  // 1 to 8
  int axis;   // 0 or 1
};

// `count` rounded up so that vectors may run past the last number: at least 16 places follow it.
inline int64_t padded(int64_t count) { return (count + 47) / 16 * 16; }

// True if groups consist of whole quads (4 neighbouring codes), which is what integer products add up first.
inline bool quad_groups(const Weight& w) { return w.axis == 0 || w.groups == 1 || w.group_size % 4 == 0; }

// True if the numbers of the format are integers, or a table that has digits.
inline bool integer_codes(const Weight& w) { return w.table.values == nullptr || w.table.count > 0; }

// True if groups line up with chunks of 64 codes: a group has whole chunks, or a chunk whole groups.
inline bool chunk_groups(const Weight& w) {
  return w.axis == 0 || w.groups == 1 || w.group_size % 64 == 0 || (w.group_size % 8 == 0 && 64 % w.group_size == 0);
}

// True if linear_rows must look up a scale for each quad: groups do not line up with chunks, but consist of whole quads, and
// are long enough for the scales of a block of 128 codes to fit one vector.
inline bool quad_rows(const Weight& w) {
  return w.axis == 1 && w.groups > 1 && w.group_size % 4 == 0 && w.group_size >= 12 && !chunk_groups(w);
}

// True if integer products cost more than usual: for axis 0 each group quantizes the activations again, and three digits of
// the activations times several digits of a table are many products.
inline bool costly_as_integers(const Weight& w, int digits) {
  return (w.axis == 0 && digits > 1) || (w.table.count > 1 && digits == 3);
}

// True if activations are quantized group by group, not chunk by chunk: groups of up to 128 columns that line up with chunks.
// Then a row's scales and the steps of the activations are multiplied entry by entry.
inline bool step_per_group(const Weight& w) { return w.axis == 1 && w.groups > 1 && w.group_size <= 128 && chunk_groups(w); }

// True if a step is that of two chunks, those of a group of 128.
inline bool step_spans_two_chunks(const Weight& w) { return step_per_group(w) && w.group_size == 128; }

// Steps of one chunk: one for each of its groups, all equal.
inline int64_t steps_of_chunk(const Weight& w) { return step_per_group(w) && w.group_size < 64 ? 64 / w.group_size : 1; }

// Steps of one row of quantized activations (one for each group or for each chunk), padded.
inline int64_t steps_per_row(const Weight& w) {
  const int64_t chunks = (w.K + 63) / 64;
  if (quad_rows(w)) return padded(w.groups > chunks ? w.groups : chunks);  // sets differ
  return padded(step_per_group(w) ? w.groups : chunks);
}

// Chunks that a row of quantized activations has memory for in Layout::rows. Where each quad looks its scale up, a set may
// take 16 groups at a time (avx512/spans.h).
inline int64_t row_chunks(const Weight& w) {
  const int64_t chunks = (w.K + 63) / 64, spans = quad_rows(w) ? (w.groups + 15) / 16 * w.group_size / 4 : 0;
  return spans > chunks ? spans : chunks;
}

// Index of the step of a chunk. Where a chunk has several groups these have equal steps, and this is the first one.
inline int64_t step_index(const Weight& w, int64_t chunk) {
  if (!step_per_group(w)) return chunk;
  return step_spans_two_chunks(w) ? chunk / 2 : chunk * steps_of_chunk(w);
}

}  // namespace hqqtensor
