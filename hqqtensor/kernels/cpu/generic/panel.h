// What panels of rows share on all instruction sets that have them. A panel is 32 rows of the weight, transposed so that lanes
// are rows; its columns are multiplied a run at a time, all columns of a run being scaled by the same numbers:
//
//            columns ->
//   row  0   |--- segment 0 ---|--- segment 1 ---| ...     one group and one step of the activations each
//   row  1   |                 |                 |
//   ...      |     scale       |      scale      |         [groups][32]: a vector has the scales of neighbouring rows
//   row 31   |                 |                 |
#pragma once
#include <type_traits>

#include "generic/rows.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kPanelRows = 32;

// Rows n, n + step, ... before last, up to kPanelRows of them, and those after them. Places left over have the first row again.
struct PanelRows {
  int64_t index[kPanelRows], count = 0;
  const uint8_t *data[kPanelRows], *after[kPanelRows];

  PanelRows(const Weight& w, int64_t n, int64_t step, int64_t last) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t row = n + r * step, later = row + kPanelRows * step;
      index[r] = row < last ? row : n;
      data[r] = w.qdata + index[r] * w.row_stride;
      after[r] = w.qdata + (later < last ? later : n) * w.row_stride;
      count += row < last;
    }
  }
};

// The short last block of ROWS rows, `count` codes at `offset` of each, as bytes: blocks of 8 bits.
template <int ROWS>
struct UnpackedRows {
  uint8_t codes[ROWS][128] = {};
  const uint8_t* rows[ROWS];

  UnpackedRows(const uint8_t* const* packed, int64_t offset, int nbits, int64_t count) {
    for (int r = 0; r < ROWS; ++r) {
      unpack_codes(packed[r] + offset, nbits, count, codes[r]);
      rows[r] = codes[r];
    }
  }
};

// Groups whose scales a panel has: axis 0 multiplies them into the activations.
inline int64_t panel_groups(const Weight& w) { return w.axis == 1 ? w.groups : 1; }

// Columns whose products are one sum of integers.
struct Segment {
  int64_t first, last;  // quads, counted from the run's first
  int64_t group, step;  // what the sum is scaled by
  bool opens;           // the first segment of its group, which takes the zero point out
};

// The segments of columns [k, k + depth), none longer than `longest` columns. Returns how many there are.
int64_t panel_segments(const Weight& w, int64_t k, int64_t depth, int64_t longest, Segment* out) {
  const int64_t end = k + depth;
  int64_t count = 0;
  for (int64_t at_k = k; at_k < end;) {
    int64_t stop = (at_k / longest + 1) * longest, group = 0;
    bool opens = at_k == 0;
    if (w.axis == 1 && w.groups > 1) {
      group = at_k / w.group_size;
      opens = at_k % w.group_size == 0;
      const int64_t group_end = (group + 1) * w.group_size;
      stop = group_end < stop ? group_end : stop;
    }
    stop = stop < end ? stop : end;
    out[count++] = {(at_k - k) / 4, (stop - k + 3) / 4, group, step_index(w, at_k / 64), opens};
    at_k = stop;
  }
  return count;
}

// Of `count` rows: scales times `unit`, and what the sums of x are multiplied with to take zero points out, which is minus
// scale times zero point, or times `offset` where the format has a table. Rows are `width` apart, which is padded(groups) at
// least; zeros follow the last group.
void scale_and_shift(const Weight& w, const int64_t* rows, int64_t count, float unit, float offset, int64_t width, float* scale,
                     float* shift) {
  for (int64_t r = 0; r < count; ++r) {  // all of them first: what was just stored is slow to load where vectors overlap
    load_values(w.scale, rows[r], 0, w.groups, scale + r * width);
    if (w.zero.data) load_values(w.zero, rows[r], 0, w.groups, shift + r * width);
  }
  for (int64_t r = 0; r < count; ++r, scale += width, shift += width) {
    int64_t g = 0;
    for (; g < w.groups; g += kFloats) {
      const Floats s = f_load(scale + g);
      f_store(shift + g, f_mul(f_sub(f_zero(), s), w.zero.data ? f_load(shift + g) : f_set(offset)));
      f_store(scale + g, f_mul(s, f_set(unit)));
    }
    f_store(scale + g, f_zero());
    f_store(shift + g, f_zero());
  }
}

// The same for `count` rows, a multiple of kFloats: [groups][kPanelRows] each. lines: scratch memory for 2 kFloats rows.
// transpose(in, stride, out): out[i * kPanelRows + l] = in[l * stride + i] for i and l below kFloats.
template <class Transpose>
void transpose_scales(const Weight& w, const int64_t* rows, int64_t count, float unit, float offset, float* lines, float* scale,
                      float* shift, Transpose transpose) {
  const int64_t width = padded(w.groups);
  float *s = lines, *z = lines + kFloats * width;
  for (int64_t first = 0; first < count; first += kFloats) {
    scale_and_shift(w, rows + first, kFloats, unit, offset, width, s, z);
    for (int64_t g = 0; g < w.groups; g += kFloats) {
      transpose(s + g, width, scale + g * kPanelRows + first);
      transpose(z + g, width, shift + g * kPanelRows + first);
    }
  }
}

// Lines of packed codes that are needed next, fetched a few at a time while products keep the processor busy.
class Prefetcher {
 public:
  // While columns [k, k + depth) of `count` rows are multiplied: the next `depth` columns of these rows, or after their last
  // column the first ones of the rows `after`.
  Prefetcher(const Weight& w, const uint8_t* const* rows, const uint8_t* const* after, int64_t count, int64_t k, int64_t depth)
      : rows_(rows), count_(count) {
    const int64_t next = k + depth, left = w.K - next;
    if (left <= 0) rows_ = after;
    offset_ = left > 0 ? next / 8 * w.nbits : 0;
    bytes_ = (left > 0 && left < depth ? left : depth) / 8 * w.nbits;
  }
  void run(int64_t lines) {
    // In registers meanwhile: the compiler cannot know that a prefetch changes no member.
    int64_t row = row_, offset = offset_, bytes = bytes_;
    for (; lines > 0 && bytes > 0; --lines) {
      prefetch(rows_[row] + offset);
      if (++row == count_) row = 0, offset += 64, bytes -= 64;
    }
    row_ = row, offset_ = offset, bytes_ = bytes;
  }
  // Lines that are left.
  int64_t lines() const { return (bytes_ + 63) / 64 * count_ - row_; }

 private:
  const uint8_t* const* rows_;
  int64_t count_;   // rows
  int64_t offset_;  // of the next line in each row
  int64_t bytes_;   // still to fetch of each row
  int64_t row_ = 0;
};

// Sums [M][kPanelRows] of rows n, n + step, ... as results. minus: [M] or null: what the zero points of axis 0 add to each.
void store_panel(const Problem& p, const float* minus, int64_t n, int64_t step, int64_t count, float* sums) {
  for (int64_t m = 0; m < p.M; ++m, sums += kPanelRows) {
    if (minus)
      for (int64_t r = 0; r < count; ++r) sums[r] -= minus[m];
    store_results(p, m, n, step, count, sums);
  }
}

// f(digits of the activations, digits of the codes), both known when this is compiled.
template <class F>
inline void with_digits(const Weight& w, int digits, F f) {
  const auto with = [&](auto d) {
    constexpr int D = d.value;
    if (w.table.count > 1) return f(d, std::integral_constant<int, D == 1 ? 2 : D>());
    f(d, std::integral_constant<int, 1>());
  };
  if (digits == 1) return with(std::integral_constant<int, 1>());
  if (digits == 2) return with(std::integral_constant<int, 2>());
  with(std::integral_constant<int, 3>());
}

// Codes 4 J .. 4 J + 3 of each row out of the transposed plane of P bits at t, moved to bit LOW of each byte, other bits zero.
template <int P, int LOW, int J, class Vector>
inline __attribute__((always_inline)) Vector transposed_plane(const Vector* t) {
  return keep(((1 << P) - 1) << LOW, shift_right<(J / (4 * P)) * P - LOW>(t[J % (4 * P)]));
}

// The same out of all planes of a block of 128, which follow one another.
template <int NB, int J, class Vector>
inline __attribute__((always_inline)) Vector transposed_codes(const Vector* t) {
  if constexpr (NB == 8) return t[J];
  Vector v{};
  if constexpr ((NB & 4) != 0) v = transposed_plane<4, 0, J>(t);
  if constexpr ((NB & 2) != 0) v |= transposed_plane<2, NB & 4, J>(t + 4 * (NB & 4));
  if constexpr ((NB & 1) != 0) v |= transposed_plane<1, NB & 6, J>(t + 4 * (NB & 6));
  return v;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
