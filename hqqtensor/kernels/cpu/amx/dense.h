// y = x W^T for many rows of x through AMX: a panel of rows of the weight is dequantized in cache as bf16 splits
// (amx/splits.h), and each split is multiplied with the splits of all tokens; sums are float32. Serves every format, group size
// and axis, also those that integer kernels do not.
#pragma once
#include "amx/lookup.h"
#include "amx/tiles.h"
#include "dispatch/targets.h"
#include "generic/unrolled.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// Which splits are multiplied: product i of `count` takes split w(i) of the weight and split x(i) of the activations. Products
// that are too small to change the result are left out. Neighbours share a split, which is loaded once.
struct Splits11 {  // both rounded once, as a dense bf16 product has them
  static constexpr int W = 1, X = 1, count = 1;
  static constexpr int w(int) { return 0; }
  static constexpr int x(int) { return 0; }
};
struct Splits21 {
  static constexpr int W = 2, X = 1, count = 2;
  static constexpr int w(int i) { return 1 - i; }
  static constexpr int x(int) { return 0; }
};
struct Splits22 {
  static constexpr int W = 2, X = 2, count = 3;
  static constexpr int w(int i) { return i == 2; }
  static constexpr int x(int i) { return i == 0; }
};
struct Splits33Small {  // of at most 2^-8 of the product each: these sums round next to nothing
  static constexpr int W = 3, X = 3, count = 5;
  static constexpr int w(int i) { return i < 2 ? 0 : i < 4 ? 1 : 2; }
  static constexpr int x(int i) { return i == 0 ? 2 : i < 3 ? 1 : 0; }
};
struct Splits33Large {
  static constexpr int W = 3, X = 3, count = 1;
  static constexpr int w(int) { return 0; }
  static constexpr int x(int) { return 0; }
};
struct Splits33 {  // the small ones, then the large ones
  static constexpr int W = 3, X = 3;
};

// A register tile of R x T tiles of the result, rows of the weight x tokens. The eight tile registers:
//   0..3  sums     4..6 (or 4, 5)  rows of the weight     6, 7 (or 7)  tokens
template <int R, int T>
struct Block {
  static constexpr int left(int r) { return 4 + r % (R > 2 ? 3 : 2); }
  static constexpr int right(int t) { return T == 1 ? 7 : 6 + t; }

  template <class P>
  static __attribute__((always_inline)) void steps(const char* a, int64_t a_tile, const char* b, int64_t b_tile,
                                                   int64_t count) {
    for (int64_t s = 0; s < count; ++s, a += P::W * kTileBytes, b += P::X * kTileBytes)
      unrolled<P::count>([&](auto i) __attribute__((always_inline)) {
        if constexpr (i == 0 || P::x(i) != P::x(i - 1))
          unrolled<T>([&](auto t) { tile_load<right(t)>(b + t * b_tile + P::x(i) * kTileBytes); });
        unrolled<R>([&](auto r) {
          if constexpr (i == 0 || P::w(i) != P::w(i - 1) || R > 2) tile_load<left(r)>(a + r * a_tile + P::w(i) * kTileBytes);
          unrolled<T>([&](auto t) { tile_multiply<r * T + t, left(r), right(t)>(); });
        });
      });
  }

  // sums += product, R x T tiles `row` floats apart.
  template <class P>
  static void multiply(const char* a, int64_t a_tile, const char* b, int64_t b_tile, int64_t count, float* sums, int64_t row,
                       bool first) {
    const auto each = [&](auto f) __attribute__((always_inline)) {
      unrolled<R * T>([&](auto c) { f(c, sums + c / T * row + c % T * 256); });
    };
    if (P::W < 3 && !first)
      each([](auto c, float* sum) { tile_load<c>(sum); });
    else
      each([](auto c, float*) { tile_zero<c>(); });
    if constexpr (P::W == 3) {
      steps<Splits33Small>(a, a_tile, b, b_tile, count);
      steps<Splits33Large>(a, a_tile, b, b_tile, count);
    } else {
      steps<P>(a, a_tile, b, b_tile, count);
    }
    if (P::W < 3 || first) return each([](auto c, float* sum) { tile_store<c>(sum); });
    // Rounding adds up where sums are long: these are of no more than a slice.
    alignas(64) float more[256];
    each([&](auto c, float* sum) {
      tile_store<c>(more);
      for (int i = 0; i < 256; i += 16) f_store(sum + i, f_add(f_load(sum + i), f_load(more + i)));
    });
  }
};

// Splits of the weight and of the activations, and what multiplies them: register tiles of 1 to 4 tiles of rows by one of
// tokens, and of 1 or 2 by two.
struct Products {
  int64_t W, X;
  void (*one[4])(const char*, int64_t, const char*, int64_t, int64_t, float*, int64_t, bool);
  void (*two[2])(const char*, int64_t, const char*, int64_t, int64_t, float*, int64_t, bool);
};
template <class P>
constexpr Products kProducts{
    P::W,
    P::X,
    {Block<1, 1>::multiply<P>, Block<2, 1>::multiply<P>, Block<3, 1>::multiply<P>, Block<4, 1>::multiply<P>},
    {Block<1, 2>::multiply<P>, Block<2, 2>::multiply<P>}};

// The order in which rows are taken. axis 0: 16 groups at a time, the first row of each, then the next of each, so that a
// panel reads scales once for several rows, and its results lie next to each other.
struct RowBlock {
  int64_t begin, end, first, width, step;  // places; row of the first; rows before one of the same group; from that to the next

  RowBlock(const Weight& w, int64_t place) : begin(0), end(w.N), first(0), width(1), step(1) {
    if (w.axis == 1) return;
    step = w.groups;
    for (;; first += 16, begin = end) {
      width = w.groups - first < 16 ? w.groups - first : 16;
      const int64_t more = w.N % w.groups - first;  // groups that have a row more
      end = begin + w.N / w.groups * width + (more < 0 ? 0 : more < width ? more : width);
      if (place < end) return;
    }
  }
  int64_t row(int64_t place) const { return first + (place - begin) / width * step + (place - begin) % width; }
};

int64_t amx_scratch(const Problem& p) {
  return kDenseRows * (kSlice / 2 * 3 + token_tiles(p.M) * 16) + PanelValues::floats(p.w);
}

// To nearest even. Not the instruction for it, which makes the smallest numbers zero.
inline __m256i to_bf16(Floats v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

// Rows index[0, count) of the result out of a tile, tokens m and on. Bits: those that are not finite.
__attribute__((noinline)) uint32_t store_tile(const Problem& p, const float* sums, const int64_t* index, int64_t count,
                                              int64_t m) {
  __m512i v[16];
  const int64_t tokens = p.M - m < 16 ? p.M - m : 16;
  const __mmask16 there = (__mmask16)((1u << tokens) - 1);
  uint32_t bad = 0;
  for (int i = 0; i < 16; ++i) {
    const __m512 row = f_load(sums + 16 * i);
    if (i < count && _mm512_mask_cmp_ps_mask(there, f_abs(row), f_set(__builtin_inff()), _CMP_NLT_UQ)) bad |= 1u << i;
    v[i] = _mm512_castps_si512(row);
  }
  transpose16x16(v);
  for (int64_t r = 0, run; r < count; r += run) {  // neighbours at a time
    for (run = 1; r + run < count && index[r + run] == index[r] + run;) ++run;
    const __mmask16 some = (__mmask16)((1u << run) - 1);
    const Floats bias = p.bias ? _mm512_maskz_loadu_ps(some, p.bias + index[r]) : f_zero();
    char* out = (char*)p.y + (m * p.y_stride + index[r]) * size_of(p.x_type);
    for (int64_t t = 0; t < tokens; ++t, out += p.y_stride * size_of(p.x_type)) {
      const Floats y = f_add(_mm512_castsi512_ps(_mm512_maskz_compress_epi32((__mmask16)(some << r), v[t])), bias);
      if (p.x_type == DType::f32)
        _mm512_mask_storeu_ps(out, some, y);
      else
        _mm256_mask_storeu_epi16(out, some,
                                 p.x_type == DType::f16 ? _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT) : to_bf16(y));
    }
  }
  return bad;
}

// Bytes from 16 rows of a panel with W splits to the next 16.
constexpr int64_t row_tile(int64_t W) { return kSlice / kTileColumns * W * kTileBytes; }

// Columns [k, k + depth) of rows index[0, count) into the panel, [16 rows][steps][W splits] tiles; what comes after them is
// prefetched: their next columns, or the rows from position `end` on. put: what pick_row chose.
void fill_panel(const Weight& w, int64_t W, const RowBlock& block, int64_t end, const int64_t* index, int64_t count, int64_t k,
                int64_t depth, PutRow put, SliceValues& values, const PanelValues& groups, char* panel) {
  const int64_t next = k + kSlice;
  const auto make = [&](int64_t r) {
    put(w, index[r], k, depth, values, w.axis == 1 ? groups.row(r, k) : GroupValues{},
        panel + r / 16 * row_tile(W) + r % 16 * 64);
    const uint8_t* soon = nullptr;
    if (next < w.K) {
      soon = w.qdata + index[r] * w.row_stride + next / 8 * w.nbits;
    } else if (end + r < block.end) {
      const int64_t row = block.row(end + r);
      soon = w.qdata + row * w.row_stride;
      if (w.axis == 1) prefetch_values(w.scale, row), prefetch_values(w.zero, row);
    }
    if (soon)
      for (int64_t i = 0; i < kSlice / 8 * w.nbits; i += 64) prefetch(soon + i);
  };
  if (w.axis == 1) {
    values.of_columns(w, k, depth);
    for (int64_t r = 0; r < count; ++r) make(r);
    return;
  }
  for (int64_t c = 0; c < block.width && c < count; ++c) {
    values.of_rows(w, index[c] % w.groups, k, depth, W == 1 && !w.table.values);
    for (int64_t r = c; r < count; r += block.width) make(r);
  }
}

// sums += the panel times the same columns of all tokens, of which `x` has the first: [row tiles][token tiles][16][16].
inline void multiply_panel(const Products& products, const char* panel, int64_t row_tiles, const char* x, int64_t x_tile,
                           int64_t tiles, int64_t steps, bool first, float* sums) {
  const int64_t row_bytes = row_tile(products.W);
  for (int64_t t = 0, tokens; t < tiles; t += tokens) {
    tokens = tiles - t < 2 ? 1 : 2;
    for (int64_t r = 0, rows, most = 4 / tokens; r < row_tiles; r += rows) {
      rows = row_tiles - r < most ? row_tiles - r : most;
      (tokens == 1 ? products.one : products.two)[rows - 1](panel + r * row_bytes, row_bytes, x + t * x_tile, x_tile, steps,
                                                            sums + (r * tiles + t) * 256, tiles * 256, first);
    }
  }
}

void multiply_dense_rows(const Problem& p, const DenseActivations& x, const Products& products, int64_t first, int64_t last,
                         float* scratch) {
  const int64_t W = products.W, X = products.X;
  const Weight& w = p.w;
  const int64_t tiles = token_tiles(p.M), x_tile = tile_steps(w.K) * X * kTileBytes;
  char* panel = (char*)scratch;
  float* sums = scratch + kDenseRows * kSlice / 2 * W;
  const PutRow put = W == 1 ? pick_row<1>(w) : W == 2 ? pick_row<2>(w) : pick_row<3>(w);
  SliceValues values;
  PanelValues groups(w, sums + kDenseRows * tiles * 16);
  constexpr Tiles::Shape whole{kAmxTileRows, 64};
  const Tiles::Shape shapes[8] = {whole, whole, whole, whole, whole, whole, whole, whole};
  RowBlock block(w, first);
  // For few tokens, writing the panel takes longer than multiplying it: half of one stays in the first level.
  const int64_t most = p.M <= 128 && w.axis == 1 && !can_look_up(w) ? kDenseRows / 2 : kDenseRows;
  for (int64_t n = first, end; n < last; n = end) {
    if (n == block.end) block = RowBlock(w, n);
    end = n + most < last ? n + most : last;
    if (end > block.end) end = block.end;
    const int64_t count = end - n, row_tiles = (count + 15) / 16;
    int64_t index[kDenseRows];
    for (int64_t r = 0; r < count; ++r) index[r] = block.row(n + r);
    const Tiles configured(shapes);
    for (int64_t k = 0; k < w.K; k += kSlice) {
      const int64_t depth = w.K - k < kSlice ? w.K - k : kSlice;
      if (w.axis == 1 && k % kLong == 0) groups.load(w, index, count, k);
      fill_panel(w, W, block, end, index, count, k, depth, put, values, groups, panel);
      const char* columns = (const char*)x.packed + k / kTileColumns * X * kTileBytes;
      multiply_panel(products, panel, row_tiles, columns, x_tile, tiles, tile_steps(depth), k == 0, sums);
    }
    for (int64_t r = 0; r < row_tiles; ++r) {
      uint32_t bad = 0;
      for (int64_t t = 0; t < tiles; ++t)
        bad |= store_tile(p, sums + (r * tiles + t) * 256, index + 16 * r, count - 16 * r < 16 ? count - 16 * r : 16, 16 * t);
      // Inf times the split of a number that is zero is NaN: only vectors say what such rows are.
      for (; bad; bad &= bad - 1) {
        const int64_t row = index[16 * r + __builtin_ctz(bad)];
        kernels_avx512()->linear_dense(p, x, row, row + 1, scratch + amx_scratch(p));
      }
    }
  }
}

void linear_splits(const Problem& p, const DenseActivations& x, int64_t first, int64_t last, float* scratch) {
  const Products& products = x.splits == 3   ? kProducts<Splits33>
                             : x.splits == 2 ? kProducts<Splits22>
                             : p.rounded     ? kProducts<Splits11>
                                             : kProducts<Splits21>;
  multiply_dense_rows(p, x, products, first, last, scratch);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
