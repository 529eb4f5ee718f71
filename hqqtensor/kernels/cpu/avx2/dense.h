// y = x W^T in float32, AVX2: the codes of a panel of rows are transposed so that lanes are rows, dequantized column by column
// in the first level of cache, and multiplied with all tokens. For exact activations of several tokens and more, and for every
// format, group size and axis that integer kernels do not serve.
//
//   dequantized panel  [2 pairs][kDenseDepth columns][16 rows]     a pair is 16 rows: two vectors
//   packed tokens      [6 tokens each][K][tokens of the tile]
#pragma once
#include <utility>

#include "avx2/transpose.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

constexpr int64_t kDenseDepth = 128, kDenseQuads = kDenseDepth / 4;  // columns at a time: what is made of them stays in L1
constexpr int64_t kDenseTokens = 6;                                  // of a tile: 12 of 16 registers hold its sums

// Tokens [first, last), `first` a multiple of kDenseTokens, as [K][tokens of the tile], tiles M K / kDenseTokens apart.
bool pack_activations(const DenseActivations& x, int64_t, int64_t first, int64_t last, int64_t K, float* out) {
  for (int64_t m = first; m < last; m += kDenseTokens) {
    const int64_t tokens = last - m < kDenseTokens ? last - m : kDenseTokens;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* in = x.x + (m + t) * x.stride;
      float* to = out + m * K + t;
      for (int64_t k = 0; k < K; ++k) to[k * tokens] = in[k];
    }
  }
  return true;
}
int64_t packed_activations_size(int64_t M, int64_t K, int) { return M * K; }

// out[T][8 V of kPanelRows] += V / 2 pairs of the panel, [kDenseDepth][kPairRows] each, times x [depth][T]. The
// accumulators are arguments by value: an array of them would be kept in memory.
template <int V, int T, int... I, class... Acc>
inline __attribute__((always_inline)) void dense_steps(const float* w, const float* x, int64_t depth, float* out,
                                                       std::integer_sequence<int, I...>, Acc... acc) {
  constexpr int64_t pair = kDenseDepth * kPairRows;
  for (const float* end = w + depth * kPairRows; w != end; w += kPairRows, x += T) {
    ((acc = _mm256_fmadd_ps(_mm256_load_ps(w + I % V / 2 * pair + 8 * (I % 2)), _mm256_broadcast_ss(x + I / V), acc)), ...);
    (keep_in_register(acc), ...);
  }
  const auto put = [](float* to, __m256 sum)
                       __attribute__((always_inline)) { _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), sum)); };
  (put(out + I / V * kPanelRows + 8 * (I % V), acc), ...);
}

template <int V, int T, int... I>
void dense_tile(const float* w, const float* x, int64_t depth, float* out, std::integer_sequence<int, I...> all) {
  dense_steps<V, T>(w, x, depth, out, all, ((void)I, _mm256_setzero_ps())...);
}

using DenseRun = void (*)(const float*, const float*, int64_t, float*);
template <int V, int T>
void dense_run(const float* w, const float* x, int64_t depth, float* out) {
  dense_tile<V, T>(w, x, depth, out, std::make_integer_sequence<int, V * T>());
}
// The widest tile for some pairs of rows and tokens, and its pairs.
inline DenseRun pick_dense(int64_t pairs, int64_t tokens, int64_t* taken) {
  static constexpr DenseRun one[] = {dense_run<2, 1>, dense_run<2, 2>, dense_run<2, 3>,
                                     dense_run<2, 4>, dense_run<2, 5>, dense_run<2, 6>};
  static constexpr DenseRun two[] = {dense_run<4, 1>, dense_run<4, 2>};
  *taken = pairs == 2 && tokens <= 2 ? 2 : 1;
  return (*taken == 2 ? two : one)[tokens - 1];
}

// The numbers of 8 codes, one in each lane, before scaling.
struct PlainCodes {
  explicit PlainCodes(const Weight&, const int64_t*) {}
  Floats operator()(__m256i codes) const { return _mm256_cvtepi32_ps(codes); }
};
struct Table8 {
  __m256 table;
  Table8(const Weight& w, const int64_t*) {
    float t[8] = {};
    __builtin_memcpy(t, w.table.values, sizeof(float) << (w.nbits < 3 ? w.nbits : 3));
    table = _mm256_loadu_ps(t);
  }
  Floats operator()(__m256i codes) const { return _mm256_permutevar8x32_ps(table, codes); }
};
struct Table16 {
  __m256 low, high;
  Table16(const Weight& w, const int64_t*) : low(_mm256_loadu_ps(w.table.values)), high(_mm256_loadu_ps(w.table.values + 8)) {}
  Floats operator()(__m256i codes) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
};
struct TableRows {  // of any size, each row its own or all the same
  const float* table;
  __m256i start;
  TableRows(const Weight& w, const int64_t* rows) : table(w.table.values + rows[0] * w.table.stride) {
    alignas(32) int32_t at[8];
    for (int r = 0; r < 8; ++r) at[r] = (int32_t)((rows[r] - rows[0]) * w.table.stride);
    start = _mm256_load_si256((const __m256i*)at);
  }
  Floats operator()(__m256i codes) const { return _mm256_i32gather_ps(table, _mm256_add_epi32(codes, start), 4); }
};

// Four columns of a pair out of its codes. scale, shift: functions of the column and vector that give what multiplies
// numbers and what is then added.
template <class Numbers, class Scale, class Shift>
inline __attribute__((always_inline)) void dense_quad(const __m256i* codes, const Numbers* numbers, Scale scale, Shift shift,
                                                      float* out) {
  const __m256i byte = _mm256_set1_epi32(255), a = codes[0], b = codes[1];
  const auto put = [&](int c, __m256i first, __m256i second) __attribute__((always_inline)) {
    _mm256_store_ps(out + c * kPairRows, _mm256_fmadd_ps(numbers[0](first), scale(c, 0), shift(c, 0)));
    _mm256_store_ps(out + c * kPairRows + 8, _mm256_fmadd_ps(numbers[1](second), scale(c, 1), shift(c, 1)));
  };
  put(0, _mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
  put(1, _mm256_and_si256(_mm256_srli_epi32(a, 8), byte), _mm256_and_si256(_mm256_srli_epi32(b, 8), byte));
  put(2, _mm256_and_si256(_mm256_srli_epi32(a, 16), byte), _mm256_and_si256(_mm256_srli_epi32(b, 16), byte));
  put(3, _mm256_srli_epi32(a, 24), _mm256_srli_epi32(b, 24));
}

// Scale and shift of a panel: axis 1 [groups][kPanelRows], axis 0 (all rows of one group) [columns].
struct DenseValues {
  const float *scale, *shift;
};

// Columns [k, k + depth) of a pair as dense numbers.
template <class Numbers>
void dense_columns(const Weight& w, const int64_t* rows, const __m256i* codes, const DenseValues& values, int64_t k,
                   int64_t depth, float* out) {
  const Numbers numbers[2] = {Numbers(w, rows), Numbers(w, rows + 8)};
  const __m256i* const end = codes + (depth + 3) / 4 * 2;
  if (w.axis == 0) {
    for (const float *s = values.scale + k, *z = values.shift + k; codes != end;
         codes += 2, out += 4 * kPairRows, s += 4, z += 4)
      dense_quad(
          codes, numbers, [&](int c, int) { return _mm256_broadcast_ss(s + c); },
          [&](int c, int) { return _mm256_broadcast_ss(z + c); }, out);
    return;
  }
  const int64_t size = w.groups == 1 ? w.K + 4 : w.group_size;
  int64_t group = k / size, left = size - k % size;
  while (codes != end) {
    const float *scale = values.scale + group * kPanelRows, *shift = values.shift + group * kPanelRows;
    const __m256 s[] = {_mm256_load_ps(scale), _mm256_load_ps(scale + 8)},
                 z[] = {_mm256_load_ps(shift), _mm256_load_ps(shift + 8)};
    const int64_t here = end - codes, whole = left / 4 * 2 < here ? left / 4 * 2 : here;
    for (const __m256i* stop = codes + whole; codes != stop; codes += 2, out += 4 * kPairRows)
      dense_quad(codes, numbers, [&](int, int v) { return s[v]; }, [&](int, int v) { return z[v]; }, out);
    left -= whole * 2;
    if (left == 0) {
      ++group, left = size;
    } else if (left < 4 && codes != end) {  // a quad with columns of several groups
      int64_t of[4];
      for (int64_t& o : of) {
        o = (group < w.groups ? group : w.groups - 1) * kPanelRows;
        if (--left == 0) ++group, left = size;
      }
      dense_quad(
          codes, numbers, [&](int c, int v) { return _mm256_load_ps(values.scale + of[c] + 8 * v); },
          [&](int c, int v) { return _mm256_load_ps(values.shift + of[c] + 8 * v); }, out);
      codes += 2, out += 4 * kPairRows;
    }
  }
}

void dense_panel(const Weight& w, const int64_t* rows, const __m256i* codes, DenseValues values, int64_t k, int64_t depth,
                 int64_t pairs, float* out) {
  const auto run = !w.table.values                      ? dense_columns<PlainCodes>
                   : w.table.stride != 0 || w.nbits > 4 ? dense_columns<TableRows>
                   : w.nbits == 4                       ? dense_columns<Table16>
                                                        : dense_columns<Table8>;
  for (int64_t i = 0; i < pairs; ++i) {
    run(w, rows, codes, values, k, depth, out);
    rows += kPairRows, codes += 2 * kDenseQuads, out += kDenseDepth * kPairRows;
    if (w.axis == 1) values.scale += kPairRows, values.shift += kPairRows;
  }
}

int64_t dense_values(const Weight& w) { return w.axis == 1 ? kPanelRows * padded(w.groups) : padded(w.K); }

int64_t linear_dense_scratch(const Problem& p) {
  return kDenseDepth * kPanelRows * 5 / 4 + 2 * dense_values(p.w) + 16 * padded(p.w.groups) + p.M * kPanelRows + 128;
}

// Row `place` in the order that panels take rows in: as they lie (axis 1), or group after group (axis 0).
struct RowOrder {
  int64_t N, groups;  // groups: of rows
  int64_t group(int64_t place) const {
    const int64_t few = N / groups, longer = N % groups;  // the first `longer` groups have one row more
    return place < longer * (few + 1) ? place / (few + 1) : longer + (place - longer * (few + 1)) / few;
  }
  int64_t begin(int64_t g) const { return g * (N / groups) + (g < N % groups ? g : N % groups); }
  int64_t row(int64_t place) const {
    if (groups == 1) return place;
    const int64_t g = group(place);
    return g + (place - begin(g)) * groups;
  }
};

void linear_dense(const Problem& p, const DenseActivations& x, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.w;
  __m256i* codes = (__m256i*)scratch;
  float *panel = scratch + kDenseDepth * kPanelRows / 4, *scale = panel + kDenseDepth * kPanelRows;
  float *shift = scale + dense_values(w), *lines = shift + dense_values(w), *sums = lines + 16 * padded(w.groups);
  const RowOrder order{w.N, w.axis == 0 ? w.groups : 1};
  for (int64_t n = first, end; n < last; n = end) {
    end = n + kPanelRows < last ? n + kPanelRows : last;
    if (w.axis == 0) {
      const int64_t g = order.group(n), stop = order.begin(g + 1);
      end = stop < end ? stop : end;
      if (n == first || n == order.begin(g)) {
        load_values(w.scale, g, 0, w.K, scale);
        if (w.zero.data) load_values(w.zero, g, 0, w.K, shift);
        for (int64_t k = 0; k < w.K; ++k) shift[k] = w.zero.data ? -shift[k] * scale[k] : 0;
        for (int64_t k = w.K; k < w.K + 4; ++k) scale[k] = shift[k] = 0;
      }
    }
    const int64_t pairs = (end - n + kPairRows - 1) / kPairRows;
    int64_t index[kPanelRows];
    const uint8_t *rows[kPanelRows], *after[kPanelRows];
    for (int64_t r = 0; r < pairs * kPairRows; ++r) {
      index[r] = order.row(n + r < end ? n + r : n);
      rows[r] = w.qdata + index[r] * w.row_stride;
      after[r] = w.qdata + order.row(end + r < last ? end + r : n) * w.row_stride;
    }
    if (w.axis == 1) transpose_scales(w, index, pairs * kPairRows, 1, 0, lines, scale, shift, transpose_floats);
    __builtin_memset(sums, 0, sizeof(float) * (size_t)(p.M * kPanelRows));
    for (int64_t k = 0; k < w.K; k += kDenseDepth) {
      const int64_t depth = w.K - k < kDenseDepth ? w.K - k : kDenseDepth;
      transpose_codes<false>(w, rows, pairs, k, depth, kDenseQuads, codes);
      dense_panel(w, index, codes, {scale, shift}, k, depth, pairs, panel);
      Prefetcher prefetcher(w, rows, after, pairs * kPairRows, k, depth);
      const int64_t lines_each = prefetcher.lines() / ((p.M + kDenseTokens - 1) / kDenseTokens) + 1;
      for (int64_t m = 0; m < p.M; m += kDenseTokens) {
        const int64_t tokens = p.M - m < kDenseTokens ? p.M - m : kDenseTokens;
        for (int64_t i = 0, taken; i < pairs; i += taken)
          pick_dense(pairs - i, tokens, &taken)(panel + i * kDenseDepth * kPairRows, x.packed + m * w.K + k * tokens, depth,
                                                sums + m * kPanelRows + i * kPairRows);
        prefetcher.run(lines_each);
      }
    }
    store_panel(p, nullptr, index[0], order.groups, end - n, sums);
  }
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
