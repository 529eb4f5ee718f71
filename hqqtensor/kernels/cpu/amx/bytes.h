// y = x W^T for 8-bit activations and many tokens, AMX: a panel of the weight becomes integers of 8 bits in cache, with a step
// for each row and kByteSlice columns, and so do the activations. Integers of both are summed in the tiles over all of a
// slice, where products of codes have to leave them for every group.
//
// A few columns of the activations are much larger than the others (as in all language models) and would leave these few
// steps. So each slice has 64 columns more, copies of columns of the weight: a large activation is the sum of smaller ones
// (outlier channel splitting, Zhao et al. 2019, arXiv 1901.09504, here chosen for each product).
//
//   panel of the weight  [16 rows each][steps of 64 columns, then the copies][16 rows][64]
//   activations          [16 tokens each][slices][steps of 64 columns, then the copies][16 quads][16 tokens][4],
//                        then their steps [16 tokens each][slices][16], then a BytePlan for each slice
#pragma once
#include <cmath>

#include "amx/dense.h"
#include "amx/lookup.h"
#include "amx/tiles.h"
#include "dispatch/targets.h"
#include "generic/unrolled.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kByteColumns = 64;        // of a tile
constexpr int64_t kByteSlice = 2 * kSlice;  // columns with one step; sums of their products stay below 2^24
static_assert(kLong % kByteSlice == 0);
constexpr int64_t kCopies = kByteColumns;
constexpr int64_t kSliceSteps = kByteSlice / kByteColumns + 1;
constexpr float kLeastStep = 1e-30f;  // numbers below 127 of it are left to other kernels

inline int64_t byte_slices(int64_t columns) { return (columns + kByteSlice - 1) / kByteSlice; }
inline int64_t slice_depth(int64_t K, int64_t k) { return K - k < kByteSlice ? K - k : kByteSlice; }
// Steps of a slice but its copies.
inline int64_t byte_steps(int64_t depth) { return (depth + kByteColumns - 1) / kByteColumns; }

// Which columns of a slice have copies, and how many.
struct BytePlan {
  alignas(64) float share[kByteSlice];         // of a column: 1 / (1 + its copies)
  alignas(64) int32_t column[kCopies];         // whose copy this is
  alignas(64) float number[kCopies];           // among the column's copies, from 1 on; plus a half
  alignas(64) float shares[kCopies];           // that column's share; 0 for a copy that is not used
  alignas(64) uint8_t place[kCopies];          // of the column among 128
  alignas(64) __mmask64 of[kByteSlice / 128];  // copies of columns of the first 128, of the next, ...
};

// What pack_activations writes, for M tokens.
struct ByteActivations {
  int64_t tile_bytes, slices, tiles;
  int8_t* integers;
  float* steps;
  BytePlan* plans;

  ByteActivations(int64_t M, int64_t K, const float* memory)
      : tile_bytes(byte_slices(K) * kSliceSteps * kTileBytes), slices(byte_slices(K)), tiles(token_tiles(M)),
        integers((int8_t*)(((uintptr_t)memory + 63) / 64 * 64)), steps((float*)(integers + tiles * tile_bytes)),
        plans((BytePlan*)(steps + tiles * slices * 16)) {}
  static int64_t floats(int64_t M, int64_t K) {
    const int64_t slices = byte_slices(K), of_tile = slices * (kSliceSteps * kTileBytes / 4 + 16);
    return token_tiles(M) * of_tile + slices * (int64_t)sizeof(BytePlan) / 4 + 16;
  }
};

// 16 numbers as integers of 8 bits.
inline __m128i to_bytes(Floats v) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)); }

// 64 numbers as integers of 8 bits. Dword i of quarter q of the result has numbers 4 i to 4 i + 3 of the q-th argument.
inline __m512i to_bytes(Floats a, Floats b, Floats c, Floats d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);  // of what packing leaves
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
}

// The largest of all lanes, none of them negative; NaN where there is one, which exceeds all.
inline float largest_lane(__m512i lanes) {
  const uint32_t bits = _mm512_reduce_max_epu32(lanes);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  return largest;
}

// ---- Activations ----

// largest: of each column, [depth] and zeros behind. The smallest bound that kCopies allow is found by bisection.
inline void plan_slice(const float* largest, BytePlan& plan) {
  Floats top = f_zero();
  for (int64_t i = 0; i < kByteSlice; i += 16) top = _mm512_max_ps(top, f_load(largest + i));
  const float most = _mm512_reduce_max_ps(top);
  const auto copies = [&](int64_t i, float bound) {
    return f_sub(_mm512_roundscale_ps(f_mul(f_load(largest + i), f_set(1 / bound)), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC),
                 f_set(1));
  };
  for (auto& mask : plan.of) mask = 0;
  for (int64_t i = 0; i < kCopies; ++i) plan.column[i] = 0, plan.number[i] = plan.shares[i] = 0, plan.place[i] = 0;
  for (int64_t i = 0; i < kByteSlice; i += 16) f_store(plan.share + i, f_set(1));
  if (!(most > 127 * kLeastStep && most < 1e37f)) return;  // all zeros, or pack_bytes refuses them
  float low = most / (kCopies + 1), high = most;
  for (int round = 0; round < 12; ++round) {
    const float bound = std::sqrt(low) * std::sqrt(high);
    Floats count = f_zero();
    for (int64_t i = 0; i < kByteSlice; i += 16) count = f_add(count, _mm512_max_ps(copies(i, bound), f_zero()));
    (_mm512_reduce_add_ps(count) <= kCopies ? high : low) = bound;
  }
  int64_t at = 0;
  for (int64_t i = 0; i < kByteSlice; i += 16) {
    const Floats count = _mm512_max_ps(copies(i, high), f_zero());
    f_store(plan.share + i, _mm512_div_ps(f_set(1), f_add(count, f_set(1))));
    for (uint32_t some = _mm512_cmp_ps_mask(count, f_zero(), _CMP_GT_OQ); some; some &= some - 1) {
      const int64_t column = i + __builtin_ctz(some);
      const float share = plan.share[column];
      for (int64_t c = 1; c < (int64_t)(1 / share + 0.5f) && at < kCopies; ++c, ++at) {
        plan.column[at] = (int32_t)column, plan.number[at] = (float)c + 0.5f, plan.shares[at] = share;
        plan.place[at] = column % 128, plan.of[column / 128] |= (__mmask64)1 << at;
      }
    }
  }
}

// Columns [first, last) of all tokens; first is a multiple of kByteSlice.
void plan_activations(const DenseActivations& x, int64_t M, int64_t first, int64_t last, int64_t K, float* out) {
  const ByteActivations packed(M, K, out);
  for (int64_t k = first; k < last; k += kByteSlice) {
    alignas(64) float largest[kByteSlice] = {};
    const int64_t depth = slice_depth(K, k);
    for (int64_t i = 0; i < depth; i += 16) {
      Floats top = f_zero();
      for (int64_t m = 0; m < M; ++m) top = _mm512_max_ps(top, f_abs(load_columns(x.x + m * x.stride + k + i, depth - i)));
      f_store(largest + i, top);
    }
    plan_slice(largest, packed.plans[k / kByteSlice]);
  }
}

// A share of integers whose shares add up to them: the c-th of n shares of q is floor((q + c) / n). number: c + 1/2, so that
// rounding of the quotient does no harm.
inline Floats share_of(Floats x, Floats inverse, Floats number, Floats share) {
  const Floats q = _mm512_roundscale_ps(f_mul(x, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_roundscale_ps(f_mul(f_add(q, number), share), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// Columns [k, k + depth) of up to 16 tokens, zeros for those that lack. False if numbers are not finite, or too small.
inline bool pack_byte_slice(const float* x, int64_t stride, int64_t tokens, int64_t depth, const BytePlan& plan, int8_t* out,
                            float* steps) {
  float inverse[16] = {};
  f_store(steps, f_zero());
  for (int64_t t = 0; t < tokens; ++t) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < depth; i += 16) {
      const Floats part = f_mul(f_abs(load_columns(x + t * stride + i, depth - i)), f_load(plan.share + i));
      top = _mm512_max_epu32(top, _mm512_castps_si512(part));
    }
    const float largest = largest_lane(top);
    if (largest == 0) continue;
    if (!(largest > 127 * kLeastStep && largest < 1e37f)) return false;
    steps[t] = largest / 127, inverse[t] = 127 / largest;
  }
  const auto put = [&](auto row) {
    __m512i rows[16];
    for (int64_t t = 0; t < 16; ++t) rows[t] = t < tokens ? row(x + t * stride, f_set(inverse[t])) : _mm512_setzero_si512();
    transpose16x16(rows);
    for (int64_t q = 0; q < 16; ++q) _mm512_store_si512(out + 64 * q, rows[q]);
    out += kTileBytes;
  };
  for (int64_t i = 0; i < depth; i += kByteColumns)
    put([&](const float* from, Floats by) {
      const auto part = [&](int64_t j) {
        return share_of(load_columns(from + j, depth - j), by, f_set(0.5f), f_load(plan.share + j));
      };
      return to_bytes(part(i), part(i + 16), part(i + 32), part(i + 48));
    });
  put([&](const float* from, Floats by) {
    const auto part = [&](int64_t j) {
      const Floats numbers = _mm512_i32gather_ps(_mm512_load_si512(plan.column + j), from, 4);
      return share_of(numbers, by, f_load(plan.number + j), f_load(plan.shares + j));
    };
    return to_bytes(part(0), part(16), part(32), part(48));
  });
  return true;
}

inline bool pack_bytes(const DenseActivations& x, int64_t M, int64_t first, int64_t last, int64_t K, float* out) {
  const ByteActivations packed(M, K, out);
  for (int64_t m = first; m < last; m += 16)
    for (int64_t s = 0; s < packed.slices; ++s)
      if (!pack_byte_slice(x.x + m * x.stride + s * kByteSlice, x.stride, last - m < 16 ? last - m : 16,
                           slice_depth(K, s * kByteSlice), packed.plans[s],
                           packed.integers + m / 16 * packed.tile_bytes + s * kSliceSteps * kTileBytes,
                           packed.steps + (m / 16 * packed.slices + s) * 16))
        return false;
  return true;
}

// ---- Weights ----

// Integers into a row of a panel's tiles.
struct ByteWriter {
  int8_t* out;
  Floats inverse;
  static constexpr bool fused = true;
  Floats adjusted(Floats scale) const { return f_mul(scale, inverse); }
  void operator()(int64_t column, Floats a, Floats b) const {
    const __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);  // of what packing leaves
    _mm256_storeu_si256((__m256i*)(out + column / kByteColumns * kTileBytes + column % kByteColumns),
                        _mm512_cvtsepi16_epi8(_mm512_permutexvar_epi64(order, words)));
  }
};

// The largest absolute number of row n's table.
inline float largest_entry(const Weight& w, int64_t n) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t c = 0, codes = 1 << w.nbits; c < codes; c += 16)
    top = _mm512_max_epu32(top, _mm512_castps_si512(f_abs(load_columns(w.table.values + n * w.table.stride + c, codes - c))));
  return largest_lane(top);
}

// The largest absolute number that a row's codes can stand for in `groups` groups.
inline float largest_number(const Weight& w, int64_t n, const GroupValues& values, int64_t groups) {
  __m512i top = _mm512_setzero_si512();
  const Floats entry = f_set(w.table.values ? largest_entry(w, n) : 0), last = f_set((float)((1 << w.nbits) - 1));
  for (int64_t g = 0; g < groups; g += 16) {
    const __mmask16 there = (__mmask16)((1u << std::min<int64_t>(groups - g, 16)) - 1);
    const auto span = [&] {
      const Floats zero = _mm512_maskz_loadu_ps(there, values.zero + g);
      return _mm512_max_ps(f_abs(zero), f_abs(f_sub(last, zero)));
    };
    const Floats all = f_mul(_mm512_maskz_loadu_ps(there, values.scale + g), w.table.values ? entry : span());
    top = _mm512_max_epu32(top, _mm512_castps_si512(f_abs(all)));
  }
  return largest_lane(top);
}

// True if 16 entries have a number for each code, and 64 codes have one, two or four scales.
inline bool can_look_bytes_up(const Weight& w) {
  return w.nbits <= 4 && (w.groups == 1 || w.group_size % 64 == 0 || w.group_size == 32 || w.group_size == 16);
}

// The bytes that codes stand for in the groups of a slice of a row, which vectors of 16 entries look up.
class ByteTables {
 public:
  ByteTables(const Weight& w, int64_t n, const GroupValues& groups, int64_t count, Floats inverse) {
    const __mmask16 there = (__mmask16)((1u << (1 << w.nbits)) - 1);
    numbers_ = w.table.values ? _mm512_maskz_loadu_ps(there, w.table.values + n * w.table.stride)
                              : _mm512_cvtepi32_ps(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    for (int64_t g = 0; g < count; g += 16) {
      const Floats scale = f_mul(f_load(groups.scale + g), inverse);
      f_store(scale_ + g, scale);
      f_store(shift_ + g, w.table.values ? f_zero() : shift(f_load(groups.zero + g), scale));
    }
  }
  // Of group g, in each quarter.
  __m512i one(int64_t g) const { return _mm512_broadcast_i32x4(to_bytes(group(g))); }
  // Of four groups, each in a quarter.
  __m512i four(int64_t g) const { return to_bytes(group(g), group(g + 1), group(g + 2), group(g + 3)); }

 private:
  Floats group(int64_t g) const { return f_fma(numbers_, f_set(scale_[g]), f_set(shift_[g])); }

  Floats numbers_;
  alignas(64) float scale_[kByteSlice / 16 + 16], shift_[kByteSlice / 16 + 16];
};

// Columns [k, k + depth) of row n, whole blocks of codes but for the last; SIZE: of a group, 64 for all that are longer.
template <int NB, int SIZE>
void look_bytes_up(const Weight& w, int64_t n, int64_t k, int64_t depth, const GroupValues& groups, Floats inverse,
                   int8_t* out) {
  const int64_t size = groups.size, in_group = k - groups.first * size;
  const ByteTables tables(w, n, groups, (in_group + depth - 1) / size + 1, inverse);
  const uint8_t* from = w.qdata + n * w.row_stride + k / 8 * NB;
  int64_t end = size - in_group, g = 0;  // of the group at hand; groups before it
  __m512i table = _mm512_setzero_si512();
  if constexpr (SIZE == 64) table = tables.one(0);
  const auto put = [&](int64_t column, Codes codes) __attribute__((always_inline)) {
    if constexpr (SIZE == 64) {
      if (column >= end) table = tables.one(++g), end += size;
    } else if constexpr (SIZE == 32) {
      const __m512i four = column % 128 ? table : tables.four(column / 32);
      if (column % 128 == 0) table = _mm512_shuffle_i64x2(four, four, 0xFA);  // quarters 2, 2, 3, 3
      codes = _mm512_shuffle_epi8(column % 128 ? four : _mm512_shuffle_i64x2(four, four, 0x50), codes);
    } else {
      table = tables.four(column / 16);
    }
    if constexpr (SIZE != 32) codes = _mm512_shuffle_epi8(table, codes);
    _mm512_store_si512(out + column / kByteColumns * kTileBytes, codes);
  };
  for (int64_t column = 0; column < depth; column += 128, from += 16 * NB) {
    if (column + 128 <= depth) {
      put(column, decode<NB, 0>(from));
      put(column + 64, decode<NB, 1>(from));
      continue;
    }
    alignas(64) uint8_t codes[128] = {};
    unpack_last<NB>(from, depth - column, codes);
    put(column, load_codes(codes));
    if (column + 64 < depth) put(column + 64, load_codes(codes + 64));
  }
}

template <class Numbers>
void write_bytes(const Weight& w, int64_t n, int64_t k, int64_t depth, const SliceValues& values, const GroupValues& groups,
                 const ByteWriter& write) {
  each_pair<ByteWriter, Numbers>(w, n, k, depth, values, groups, write);
}

// A row of a panel: columns [k, k + depth) of row n. values: of each kSlice columns.
inline void put_bytes(const Weight& w, int64_t n, int64_t k, int64_t depth, const SliceValues* values,
                      const PanelValues& groups, int64_t r, Floats inverse, int8_t* out) {
  if (can_look_bytes_up(w)) {
    const auto with_size = [&](auto nb) {
      if constexpr (nb.value > 4)
        return;
      else {
        const auto run = w.groups > 1 && w.group_size == 16   ? look_bytes_up<nb.value, 16>
                         : w.groups > 1 && w.group_size == 32 ? look_bytes_up<nb.value, 32>
                                                              : look_bytes_up<nb.value, 64>;
        run(w, n, k, depth, groups.row(r, k), inverse, out);
      }
    };
    return with_nbits(w.nbits, with_size);
  }
  for (int64_t i = 0; i < depth; i += kSlice) {
    const ByteWriter write{out + i / kByteColumns * kTileBytes, inverse};
    const int64_t count = depth - i < kSlice ? depth - i : kSlice;
    const auto put = !w.table.values ? write_bytes<Integers> : w.nbits <= 4 ? write_bytes<Entries16> : write_bytes<Entries>;
    put(w, n, k + i, count, values[i / kSlice], groups.row(r, k + i), write);
  }
}

// The copies of a row, out of its tiles.
inline void put_copies(const BytePlan& plan, int64_t steps, int8_t* row) {
  const __m512i place = _mm512_load_si512(plan.place);
  __m512i copies = _mm512_setzero_si512();
  for (int64_t i = 0; i < kByteSlice / 128; ++i) {
    if (!plan.of[i]) continue;
    const __m512i low = _mm512_load_si512(row + 2 * i * kTileBytes);
    const __m512i high = 2 * i + 1 < steps ? _mm512_load_si512(row + (2 * i + 1) * kTileBytes) : low;
    copies = _mm512_mask_mov_epi8(copies, plan.of[i], _mm512_permutex2var_epi8(low, place, high));
  }
  _mm512_store_si512(row + steps * kTileBytes, copies);
}

// ---- Products ----

// sums[tile] += the integers of R x T tiles, times the step of each row and token. Tiles of sums are `row` floats apart.
template <int R, int T>
void multiply_bytes(const int8_t* a, int64_t a_tile, const int8_t* b, int64_t b_tile, int64_t steps, const float* row_step,
                    const float* token_step, int64_t token_stride, float* sums, int64_t row, bool first) {
  constexpr auto left = [](int r) { return 4 + r % (R > 2 ? 3 : 2); };
  constexpr auto right = [](int t) { return T == 1 ? 7 : 6 + t; };
  unrolled<R * T>([&](auto c) { tile_zero<c>(); });
  for (int64_t s = 0; s < steps; ++s, a += kTileBytes, b += kTileBytes) {
    unrolled<T>([&](auto t) { tile_load<right(t)>(b + t * b_tile); });
    unrolled<R>([&](auto r) {
      tile_load<left(r)>(a + r * a_tile);
      unrolled<T>([&](auto t) { tile_dot_signed<r * T + t, left(r), right(t)>(); });
    });
  }
  alignas(64) int32_t integers[2][256];
  const auto add = [&](auto c) __attribute__((always_inline)) {
    float* sum = sums + c / T * row + c % T * 256;
    const Floats step = f_load(token_step + c % T * token_stride);
    for (int r = 0; r < 16; ++r) {
      const Floats product = _mm512_cvtepi32_ps(_mm512_load_si512(integers[c % 2] + 16 * r));
      const Floats by = f_mul(step, f_set(row_step[16 * (c / T) + r]));
      f_store(sum + 16 * r, first ? f_mul(product, by) : f_fma(product, by, f_load(sum + 16 * r)));
    }
  };
  tile_store<0>(integers[0]);
  unrolled<R * T>([&](auto c) {
    if constexpr (c + 1 < R * T) tile_store<c + 1>(integers[(c + 1) % 2]);
    add(c);
  });
}

using MultiplyBytes = void (*)(const int8_t*, int64_t, const int8_t*, int64_t, int64_t, const float*, const float*, int64_t,
                               float*, int64_t, bool);
inline MultiplyBytes pick_multiply_bytes(int64_t rows, int64_t tokens) {
  static constexpr MultiplyBytes one[] = {multiply_bytes<1, 1>, multiply_bytes<2, 1>, multiply_bytes<3, 1>,
                                          multiply_bytes<4, 1>};
  static constexpr MultiplyBytes two[] = {multiply_bytes<1, 2>, multiply_bytes<2, 2>};
  return (tokens == 1 ? one : two)[rows - 1];
}

void linear_bytes(const Problem& p, const DenseActivations& x, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  constexpr int64_t panel_tile = kSliceSteps * kTileBytes;
  const ByteActivations tokens(p.M, w.K, x.packed);
  const int64_t tiles = tokens.tiles;
  int8_t* panel = (int8_t*)scratch;
  float *sums = scratch + kDenseRows * kSliceSteps * kByteColumns / 4, *row_steps = sums + kDenseRows * tiles * 16;
  SliceValues values[kByteSlice / kSlice];
  PanelValues groups(w, row_steps + kDenseRows);
  constexpr Tiles::Shape whole{kAmxTileRows, 64};
  const Tiles::Shape shapes[8] = {whole, whole, whole, whole, whole, whole, whole, whole};
  const int64_t most = p.M <= 128 ? kDenseRows / 2 : kDenseRows;  // as in dense_rows
  for (int64_t n = first, end; n < last; n = end) {
    end = n + most < last ? n + most : last;
    const int64_t count = end - n, row_tiles = (count + 15) / 16;
    int64_t index[kDenseRows];
    bool refused[kDenseRows] = {};
    for (int64_t r = 0; r < count; ++r) index[r] = n + r;
    {
      const Tiles configured(shapes);
      for (int64_t k = 0; k < w.K; k += kByteSlice) {
        const int64_t depth = slice_depth(w.K, k), steps = byte_steps(depth), slice = k / kByteSlice;
        if (k % kLong == 0) groups.load(w, index, count, k);
        if (!can_look_bytes_up(w))
          for (int64_t i = 0; i < depth; i += kSlice)
            values[i / kSlice].of_columns(w, k + i, depth - i < kSlice ? depth - i : kSlice);
        const auto row = [&](int64_t r) { return panel + r / 16 * panel_tile + r % 16 * 64; };
        for (int64_t r = 0; r < count; ++r) {
          const GroupValues numbers = groups.row(r, k);
          const float largest = largest_number(w, n + r, numbers, (k + depth - 1) / numbers.size + 1 - numbers.first);
          const bool fits = largest > 127 * kLeastStep && largest < 1e37f;
          refused[r] |= largest != 0 && !fits;
          row_steps[r] = fits ? largest / 127 : 0;
          put_bytes(w, n + r, k, depth, values, groups, r, f_set(fits ? 127 / largest : 0.0f), row(r));
          const uint8_t* soon = k + kByteSlice < w.K ? w.qdata + (n + r) * w.row_stride + (k + kByteSlice) / 8 * w.nbits
                                : end + r < last     ? w.qdata + (end + r) * w.row_stride
                                                     : nullptr;
          if (soon)
            for (int64_t i = 0; i < kByteSlice / 8 * w.nbits; i += 64) prefetch(soon + i);
        }
        for (int64_t r = 0; r < count; ++r) put_copies(tokens.plans[slice], steps, row(r));
        for (int64_t t = 0, some; t < tiles; t += some) {
          some = tiles - t < 2 ? 1 : 2;
          for (int64_t r = 0, rows, wide = 4 / some; r < row_tiles; r += rows) {
            rows = row_tiles - r < wide ? row_tiles - r : wide;
            pick_multiply_bytes(rows, some)(
                panel + r * panel_tile, panel_tile, tokens.integers + t * tokens.tile_bytes + slice * kSliceSteps * kTileBytes,
                tokens.tile_bytes, steps + 1, row_steps + 16 * r, tokens.steps + (t * tokens.slices + slice) * 16,
                tokens.slices * 16, sums + (r * tiles + t) * 256, tiles * 256, k == 0);
          }
        }
      }
    }
    for (int64_t r = 0; r < row_tiles; ++r)
      for (int64_t t = 0; t < tiles; ++t)
        store_tile(p, sums + (r * tiles + t) * 256, index + 16 * r, count - 16 * r < 16 ? count - 16 * r : 16, 16 * t);
    // Rows whose numbers are not finite or too small: vectors say what they are.
    for (int64_t r = 0; r < count; ++r)
      if (refused[r]) kernels_avx512()->linear_dense(p, x, n + r, n + r + 1, scratch);
  }
}

inline int64_t linear_bytes_scratch(const Problem& p) {
  return kDenseRows * (kSliceSteps * kByteColumns / 4 + token_tiles(p.M) * 16 + 1) + PanelValues::floats(p.w);
}

// ---- What the table of kernels has for panels that are made dense: in bytes or in bf16 ----

int64_t linear_dense_scratch(const Problem& p) {
  return std::max(amx_scratch(p), linear_bytes_scratch(p)) + kernels_avx512()->linear_dense_scratch(p);
}

int64_t packed_activations_size(int64_t M, int64_t K, int splits) {
  return splits == kByteActivations ? ByteActivations::floats(M, K) : packed_splits_size(M, K, splits);
}

bool pack_activations(const DenseActivations& x, int64_t M, int64_t first, int64_t last, int64_t K, float* out) {
  return x.splits == kByteActivations ? pack_bytes(x, M, first, last, K, out) : pack_splits(x, first, last, K, out);
}

void linear_dense(const Problem& p, const DenseActivations& x, int64_t first, int64_t last, float* scratch) {
  if (!x.packed) return kernels_avx512()->linear_dense(p, x, first, last, scratch);
  (x.splits == kByteActivations ? linear_bytes : linear_splits)(p, x, first, last, scratch);
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
