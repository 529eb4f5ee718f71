// Numbers as bf16 splits for amx/dense.h: a float32 is the sum of two or three numbers of bfloat16, hi + lo or hi + mid + lo.
//
//   one tile of the weight: 16 rows x 32 columns of one split = 1024 bytes, columns in their order
//   one tile of the activations is such a tile transposed by pairs of columns: row i has columns 2 i and 2 i + 1 of 16 tokens
//
//   panel of the weight  [16 rows each][steps of 32 columns][splits] tiles
//   packed activations   [16 tokens each][steps of 32 columns][splits] tiles
#pragma once
#include <algorithm>
#include <type_traits>

#include "amx/target.h"
#include "avx512/transpose.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kTileColumns = 32, kTileBytes = 1024;
constexpr int64_t kSlice = 256;        // columns made dense at a time: whole blocks of codes
constexpr int64_t kLong = 8 * kSlice;  // columns whose scales are decoded at a time
constexpr int64_t kDenseRows = 128;    // of a panel: with its sums and the tokens of a slice it stays in the second level

// Columns a, then b. Each part is what is left, rounded to nearest even: three parts of float32 are exact, two keep 2^-16 of
// each number at worst. What is not finite stays so in a part at least. Numbers below 2^-126 become zero, as tiles take them.
template <int SPLITS>
inline __attribute__((always_inline)) void split(Floats a, Floats b, __m512i* out) {
  for (int part = 0; part < SPLITS; ++part) {
    out[part] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if (part + 1 == SPLITS) break;
    a = _mm512_sub_ps(a, from_bf16(_mm512_castsi512_si256(out[part])));
    b = _mm512_sub_ps(b, from_bf16(_mm512_extracti64x4_epi64(out[part], 1)));
  }
}

// What 16 codes stand for before scaling.
struct Integers {
  Integers(const Weight&, int64_t) {}
  Floats operator()(const uint8_t* codes, Floats zero) const { return f_sub(f_codes(codes), zero); }
};
struct Entries16 {
  __m512 table;
  Entries16(const Weight& w, int64_t n)
      : table(_mm512_maskz_loadu_ps((__mmask16)((1u << (1 << w.nbits)) - 1), w.table.values + n * w.table.stride)) {}
  Floats operator()(const uint8_t* codes, Floats) const {
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes)), table);
  }
};
struct Entries {
  const float* table;
  Entries(const Weight& w, int64_t n) : table(w.table.values + n * w.table.stride) {}
  Floats operator()(const uint8_t* codes, Floats) const {
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes)), table, 4);
  }
};

// Numbers that are rounded once are code * scale + shift, an operation less than (code - zero) * scale. The shift is rounded at
// 2^-24 of the zero point, which is nothing beside what is lost to bf16.
template <class Write, class Numbers>
constexpr bool is_fused = Write::fused && std::is_same_v<Numbers, Integers>;
inline Floats shift(Floats zero, Floats scale) { return f_mul(f_sub(f_zero(), zero), scale); }

// Scales and zero points of the groups of a row from that of some column on, for axis 1. Up to 15 numbers of no meaning follow.
struct GroupValues {
  int64_t size, first;  // columns of a group; the first group
  const float *scale, *zero;
};

// The same of the rows of a panel for kLong columns: to decode a few groups at a time would take longer than all else.
class PanelValues {
 public:
  PanelValues(const Weight& w, float* memory)
      : size_(size_of_group(w)), stride_(stride(w)), scale_(memory), zero_(memory + kDenseRows * stride_) {}

  static int64_t floats(const Weight& w) { return 2 * kDenseRows * stride(w); }

  // Rows index[0, count). k: a multiple of kLong.
  void load(const Weight& w, const int64_t* index, int64_t count, int64_t k) {
    first_ = k / size_;
    const int64_t groups = ((w.K - k < kLong ? w.K : k + kLong) - 1) / size_ + 1 - first_;
    for (int64_t r = 0; r < count; ++r) {
      load_values(w.scale, index[r], first_, groups, scale_ + r * stride_);
      if (w.zero.data) load_values(w.zero, index[r], first_, groups, zero_ + r * stride_);
    }
  }
  // Of row r of the panel, from column k on.
  GroupValues row(int64_t r, int64_t k) const {
    const int64_t first = k / size_, at = r * stride_ + first - first_;
    return {size_, first, scale_ + at, zero_ + at};
  }

 private:
  static int64_t size_of_group(const Weight& w) { return w.groups == 1 ? w.K : w.group_size; }
  // Groups in kLong columns, one more at either end, and what is read behind them.
  static int64_t stride(const Weight& w) { return w.axis == 0 ? 0 : (kLong / size_of_group(w) + 2 + 31) / 16 * 16; }

  int64_t size_, first_ = 0, stride_;
  float *scale_, *zero_;
};

// How the columns of a slice find their scales and zero points: what rows of a panel have in common.
struct SliceValues {
  alignas(64) float scale[kSlice], zero[kSlice];  // axis 0: of a group of rows, zeros behind the last column
  alignas(64) int32_t group[kSlice];              // axis 1: every 16 columns, counted from the first one's
  int64_t first[kSlice / 16];                     // that, counted from the slice's first
  bool one_vector;                                // all of these first ones are the slice's first

  // fused: zero becomes what products of codes and scales are shifted by.
  void of_rows(const Weight& w, int64_t g, int64_t k, int64_t depth, bool fused) {
    load_values(w.scale, g, k, depth, scale);
    if (w.zero.data) load_values(w.zero, g, k, depth, zero);
    for (int64_t i = depth; i % kTileColumns; ++i) scale[i] = zero[i] = 0;
    for (int64_t i = 0; fused && i < depth; i += 16) f_store(zero + i, shift(f_load(zero + i), f_load(scale + i)));
  }
  void of_columns(const Weight& w, int64_t k, int64_t depth) {
    const int32_t size = (int32_t)(w.groups == 1 ? w.K : w.group_size), begin = (int32_t)(k % size);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const int32_t last = (begin + (int32_t)depth - 1) / size;  // no group is looked for behind that of the last column
    one_vector = last < 16;
    for (int32_t i = 0; i < kSlice; i += 16) {
      const int32_t column = begin + i, g = std::min(column / size, last);
      // Of up to 15 columns more, groups are counted by a multiplication with the inverse.
      const __m512i from = _mm512_add_epi32(lanes, _mm512_set1_epi32(column - g * size));
      const __m512i by = _mm512_set1_epi32(size < 16 ? 65536 / size + 1 : 0);
      const __m512i next = size < 16 ? _mm512_srli_epi32(_mm512_mullo_epi32(from, by), 16)
                                     : _mm512_maskz_set1_epi32(_mm512_cmpge_epi32_mask(from, _mm512_set1_epi32(size)), 1);
      first[i / 16] = one_vector ? 0 : g;
      _mm512_store_si512(group + i, _mm512_add_epi32(_mm512_min_epi32(next, _mm512_set1_epi32(last - g)),
                                                     _mm512_set1_epi32(one_vector ? g : 0)));
    }
  }
  Floats pick(const float* values, int64_t i) const {
    return _mm512_permutexvar_ps(_mm512_load_si512(group + i), f_load(values + first[i / 16]));
  }
};

inline void unpack_slice(const Weight& w, int64_t n, int64_t k, int64_t depth, uint8_t* codes) {
  unpack_codes(w.qdata + n * w.row_stride + k / 8 * w.nbits, w.nbits, depth, codes);
}

// Where each_pair puts its numbers: into tiles, SPLITS of each.
template <int SPLITS>
struct SplitWriter {
  char* out;
  static constexpr bool fused = SPLITS == 1;
  Floats adjusted(Floats scale) const { return scale; }
  void operator()(int64_t column, Floats a, Floats b) const {
    __m512i splits[SPLITS];
    split<SPLITS>(a, b, splits);
    char* const to = out + column / kTileColumns * SPLITS * kTileBytes;
    for (int part = 0; part < SPLITS; ++part) _mm512_store_si512(to + part * kTileBytes, splits[part]);
  }
};

// Columns [k, k + depth) of row n, dequantized; k a multiple of kSlice, depth no more. write(i, a, b): columns k + i to
// k + i + 15, and the next 16.
template <class Write, class Numbers>
inline __attribute__((always_inline)) void each_pair(const Weight& w, int64_t n, int64_t k, int64_t depth,
                                                     const SliceValues& values, const GroupValues& groups, const Write& write) {
  alignas(64) uint8_t codes[kSlice + 128];
  unpack_slice(w, n, k, depth, codes);
  const Numbers numbers(w, n);
  constexpr bool fused = is_fused<Write, Numbers>;
  const auto scaled = [&](int64_t i, Floats zero, Floats scale)
                          __attribute__((always_inline)) { return f_mul(numbers(codes + i, zero), write.adjusted(scale)); };
  const auto shifted = [&](int64_t i, Floats by, Floats scale)
                           __attribute__((always_inline)) { return f_fma(f_codes(codes + i), scale, by); };
  const auto run = [&](int64_t first, int64_t end, auto value) __attribute__((always_inline)) {
    for (int64_t i = first; i < end; i += kTileColumns) write(i, value(i), value(i + 16));
  };
  if (w.axis == 0)
    return run(0, depth, [&](int64_t i) {
      if constexpr (fused) return shifted(i, f_load(values.zero + i), f_load(values.scale + i));
      return scaled(i, f_load(values.zero + i), f_load(values.scale + i));
    });
  const int64_t size = groups.size;
  if (w.groups == 1 || size % kTileColumns == 0) {
    for (int64_t g = 0, i = 0; i < depth; ++g) {
      const Floats s = f_set(groups.scale[g]), z = f_set(groups.zero[g]);
      const int64_t stop = (groups.first + g + 1) * size - k, end = stop < depth ? stop : depth;
      run(i, end, [&](int64_t j) { return scaled(j, z, s); });
      i = end;
    }
    return;
  }
  if (!values.one_vector)
    return run(0, depth, [&](int64_t i) { return scaled(i, values.pick(groups.zero, i), values.pick(groups.scale, i)); });
  const Floats scale = write.adjusted(f_load(groups.scale)), zero = f_load(groups.zero);
  const auto pick = [&](Floats v, int64_t i) { return _mm512_permutexvar_ps(_mm512_load_si512(values.group + i), v); };
  if constexpr (fused) {
    const Floats by = shift(zero, scale);
    run(0, depth, [&](int64_t i) { return shifted(i, pick(by, i), pick(scale, i)); });
  } else {
    run(0, depth, [&](int64_t i) { return f_mul(numbers(codes + i, pick(zero, i)), pick(scale, i)); });
  }
}

// The same into its row of tiles.
template <int SPLITS, class Numbers>
void write_row(const Weight& w, int64_t n, int64_t k, int64_t depth, const SliceValues& values, const GroupValues& groups,
               char* out) {
  each_pair<SplitWriter<SPLITS>, Numbers>(w, n, k, depth, values, groups, {out});
}

inline __m512 load_columns(const float* x, int64_t left) {
  return left >= 16 ? f_load(x) : left <= 0 ? f_zero() : f_load_some(x, left);
}

// Tokens of small numbers only lose parts, since tiles know none below 2^-126; NaN and Inf would spread.
inline bool can_split(const float* x, int64_t K) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16) top = _mm512_max_epu32(top, _mm512_castps_si512(f_abs(load_columns(x + k, K - k))));
  const uint32_t bits = _mm512_reduce_max_epu32(top), least = (127 - 60) << 23;
  return bits == 0 || (bits >= least && bits < 0x7f800000);
}

// A tile of up to 16 tokens, zeros for those it lacks: [K / 32][SPLITS] tiles of [16 lanes][16 tokens].
template <int SPLITS>
void pack_tile(const float* x, int64_t stride, int64_t tokens, int64_t K, char* out) {
  for (int64_t k = 0; k < K; k += kTileColumns, out += SPLITS * kTileBytes) {
    __m512i splits[SPLITS][16], both[SPLITS];
    for (int64_t t = 0; t < 16; ++t) {
      const float* from = x + t * stride + k;
      if (t < tokens)
        split<SPLITS>(load_columns(from, K - k), load_columns(from + 16, K - k - 16), both);
      else
        for (auto& b : both) b = _mm512_setzero_si512();
      for (int part = 0; part < SPLITS; ++part) splits[part][t] = both[part];
    }
    for (int part = 0; part < SPLITS; ++part) {
      transpose16x16(splits[part]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + part * kTileBytes + 64 * i, splits[part][i]);
    }
  }
}

inline int64_t tile_steps(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }
inline int64_t token_tiles(int64_t M) { return (M + 15) / 16; }
inline int64_t packed_splits_size(int64_t M, int64_t K, int splits) {
  return token_tiles(M) * tile_steps(K) * splits * kTileBytes / 4;
}

inline bool pack_splits(const DenseActivations& x, int64_t first, int64_t last, int64_t K, float* out) {
  for (int64_t m = first; m < last; ++m)
    if (!can_split(x.x + m * x.stride, K)) return false;
  for (int64_t m = first; m < last; m += 16) {
    const auto run = x.splits == 1 ? pack_tile<1> : x.splits == 2 ? pack_tile<2> : pack_tile<3>;
    run(x.x + m * x.stride, x.stride, last - m < 16 ? last - m : 16, K,
        (char*)out + m / 16 * tile_steps(K) * x.splits * kTileBytes);
  }
  return true;
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
