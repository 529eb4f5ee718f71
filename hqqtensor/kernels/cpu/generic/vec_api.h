// The vectors that generic code is written in: what an instruction set must supply, what it may, and what it gets otherwise.
// HQQTENSOR_VEC (generic/target.h) names the header of a set; each line below is checked when it is compiled.
//
// Codes come in blocks of 128 with all planes of a block together; a chunk is half a block, 64 codes; a quad is 4 neighbouring
// codes. Template parameters:
//   NB  bits of a code, 1 to 8
//   H   half of a block, 0 or 1
//   D   digits of an activation, 1 to 3 (dispatch/activations.h)
//   DW  digits of a code: 0 for integers, which are their own digit; 1 to 3 for numbers of a table (dispatch/weight.h)
#pragma once
#include <cstdint>
#include <type_traits>

#include "dispatch/kernels.h"
#include "generic/target.h"
#include HQQTENSOR_VEC

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// ---- What a set must supply ----

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // of vector types as arguments of templates
namespace vec_api {

// Arguments of the calls below. The compiler looks at their types only.
extern const Floats a, b, c;
extern const Codes codes;
extern const ChunkDigits digits;
extern const LaneScales lanes;
extern const Search search;
extern Acc acc;
extern const float* in;
extern float* out;
extern const uint8_t* bytes;
extern uint8_t* bytes_out;
extern const uint16_t* halves;
extern uint16_t* halves_out;
extern int8_t* digits_out;
extern int64_t n;

// The set has `call`, and it gives `type`.
// clang-format off
#define HQQTENSOR_SUPPLIES(type, ...)                \
  static_assert(requires { { __VA_ARGS__ } -> Gives<type>; }, \
                HQQTENSOR_VEC ": " #__VA_ARGS__ " must be of type " #type)
// clang-format on
template <class Found, class Wanted>
concept Gives = std::is_same_v<std::remove_cvref_t<Found>, Wanted>;

// Register tile of linear_rows: rows of the weight, and tokens.
HQQTENSOR_SUPPLIES(int, kGemvRows);
HQQTENSOR_SUPPLIES(int, kGemvTokens);
// Numbers in a vector of float32.
HQQTENSOR_SUPPLIES(int, kFloats);
// (generic/linear_dense.h also takes its register tile from the set: kDenseTileRows, kDenseTileTokens.)

// Types. Floats: kFloats numbers. Codes: a chunk of codes, a byte each. ChunkDigits: the digits of a chunk of activations.
// Acc: sums of a row of codes times a token. LaneScales: which scale each lane takes in chunks of several groups.
static_assert(std::is_constructible_v<LaneScales, int64_t>, "LaneScales(group_size), for groups of 8 to 32 codes");

// Numbers, one after the other: f_load and f_store take any address.
HQQTENSOR_SUPPLIES(Floats, f_zero());
HQQTENSOR_SUPPLIES(Floats, f_set(0.0f));
HQQTENSOR_SUPPLIES(Floats, f_load(in));
HQQTENSOR_SUPPLIES(Floats, f_load_some(in, n));  // the first n < kFloats, then zeros; reads no more than n
HQQTENSOR_SUPPLIES(Floats, f_load_f16(halves));
HQQTENSOR_SUPPLIES(Floats, f_load_bf16(halves));
HQQTENSOR_SUPPLIES(void, f_store(out, a));
HQQTENSOR_SUPPLIES(void, f_store_f16(halves_out, a));   // to nearest even
HQQTENSOR_SUPPLIES(void, f_store_bf16(halves_out, a));  // to nearest even, NaN stays NaN
HQQTENSOR_SUPPLIES(void, f_store_pairs(out, a, b));     // a0 b0 a1 b1 ..., 2 kFloats numbers

// Arithmetic, lane by lane.
HQQTENSOR_SUPPLIES(Floats, f_add(a, b));
HQQTENSOR_SUPPLIES(Floats, f_sub(a, b));
HQQTENSOR_SUPPLIES(Floats, f_mul(a, b));
HQQTENSOR_SUPPLIES(Floats, f_div(a, b));
HQQTENSOR_SUPPLIES(Floats, f_fma(a, b, c));   // a b + c
HQQTENSOR_SUPPLIES(Floats, f_fnma(a, b, c));  // c - a b
HQQTENSOR_SUPPLIES(Floats, f_min(a, b));
HQQTENSOR_SUPPLIES(Floats, f_max(a, b));
HQQTENSOR_SUPPLIES(Floats, f_abs(a));
HQQTENSOR_SUPPLIES(Floats, f_round(a));       // to the nearest integer, ties to even
HQQTENSOR_SUPPLIES(Floats, f_power(a));       // the power of two in each number: its sign and mantissa are dropped
HQQTENSOR_SUPPLIES(Floats, f_pick(c, a, b));  // a where c < 0, else b

// Over all lanes.
HQQTENSOR_SUPPLIES(float, f_sum(a));
HQQTENSOR_SUPPLIES(float, f_hmax(a));
HQQTENSOR_SUPPLIES(float, f_hmin(a));

// From codes and to them. PART: 0 for whole bytes, 1 for their low and 2 for their high nibbles.
HQQTENSOR_SUPPLIES(Floats, f_codes<0>(bytes));          // kFloats bytes as numbers
HQQTENSOR_SUPPLIES(Floats, f_codes_some<0>(bytes, n));  // the first n < kFloats, then zeros; reads no more than n
HQQTENSOR_SUPPLIES(Floats, f_lookup(bytes, in, 16));    // in[code] for kFloats codes, all below the number of entries given
HQQTENSOR_SUPPLIES(void, f_to_codes(a, bytes_out));     // whole numbers from 0 to 255

// Search(levels): which of up to 16 levels a number belongs to (struct Levels): its value, or the code of each lane.
static_assert(std::is_constructible_v<Search, const Levels&>, "Search(levels)");
HQQTENSOR_SUPPLIES(Floats, search.value(a));
HQQTENSOR_SUPPLIES(void, search.codes(a, bytes_out));

// Chunks of codes.
HQQTENSOR_SUPPLIES(Codes, decode<4, 0>(bytes));  // <NB, H>: half H of the packed block
HQQTENSOR_SUPPLIES(Codes, load_codes(bytes));    // 64 bytes
HQQTENSOR_SUPPLIES(void, store_codes(bytes_out, codes));
HQQTENSOR_SUPPLIES(Codes, lookup(codes, bytes));                    // table[code], a table of 16 bytes at a multiple of 16
HQQTENSOR_SUPPLIES(ChunkDigits, load_chunk_digits<1>(digits_out));  // <D>: [D][64] digits at a multiple of 64

// Bits of a digit of the activations, for codes of some bits.
HQQTENSOR_SUPPLIES(int, digit_shift(4));

// <NB, D, DW>: products of a chunk, [max(DW, 1)] digits of its codes, are added to acc, times
//   add_chunk         one scale
//   add_chunk_lanes   a scale for each group of the chunk
//   add_chunk_quads   scales[index[q]] * step for quad q
HQQTENSOR_SUPPLIES(void, add_chunk<4, 1, 0>(acc, &codes, digits, in));
HQQTENSOR_SUPPLIES(void, add_chunk_lanes<4, 1, 0>(acc, &codes, digits, in, lanes));
HQQTENSOR_SUPPLIES(void, add_chunk_quads<4, 1, 0>(acc, &codes, digits, in, bytes, 1.0f));

// Floats rounded to integers of `count` digits of `shift` bits, which are stored digit_stride bytes apart, and quads of them
// quad_stride bytes apart: (out, numbers, shift, count, digit_stride, quad_stride). The layouts with tiles, for which
// quad_stride is not 4, occur only with the sets that have panels.
HQQTENSOR_SUPPLIES(void, f_store_digits(digits_out, a, 8, 1, n, n));

// Fetches a line into the cache, or does nothing.
HQQTENSOR_SUPPLIES(void, prefetch(in));

}  // namespace vec_api
#pragma GCC diagnostic pop
#undef HQQTENSOR_SUPPLIES

// ---- What a set may supply ----

// float acc_sum(acc, more): the sum of acc's lanes and those of `more`. HQQTENSOR_HAS_ACC_SUMS: the set has acc_sums, below,
// in place of it, for the sums of a whole register tile.
#ifndef HQQTENSOR_HAS_ACC_SUMS
// out[t][r]: the sum of the lanes of a[r][t] and start[r][t].
template <int T>
inline void acc_sums(const Acc (*a)[T], const Floats (*start)[kGemvTokens], float (*out)[kGemvRows]) {
  for (int r = 0; r < kGemvRows; ++r)
    for (int t = 0; t < T; ++t) out[t][r] = acc_sum(a[r][t], start[r][t]);
}
#endif

// f_load_f16_some(halves, n) and f_load_bf16_some(halves, n): the first n < kFloats, then zeros; they read no more than n.
// HQQTENSOR_HAS_SOME_HALVES: the set has both.
#ifndef HQQTENSOR_HAS_SOME_HALVES
inline Floats f_load_f16_some(const uint16_t* p, int64_t n) {
  uint16_t numbers[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = p[i];
  return f_load_f16(numbers);
}
inline Floats f_load_bf16_some(const uint16_t* p, int64_t n) {
  uint16_t numbers[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = p[i];
  return f_load_bf16(numbers);
}
#endif

// HQQTENSOR_HAS_HALF_BLOCK: the set has decode_half<NB>(b), the codes of a last block of 64. Else they are unpacked by words.

// HQQTENSOR_HAS_PAIRS: blocks of 128 codes that are multiplied whole, see avx512/pairs.h.
#ifndef HQQTENSOR_HAS_PAIRS
template <int NB>
struct Pairs {
  static constexpr bool serve = false;
};
// Puts one digit of the two chunks of a block into the order of Pairs.
inline void pair_digits(int8_t*, int8_t*) {}
#endif

// HQQTENSOR_HAS_WIDE: several blocks that are multiplied together, see avx512/wide.h.
#ifndef HQQTENSOR_HAS_WIDE
template <int NB>
struct Wide {
  static constexpr bool serve = false;
};
#endif

// HQQTENSOR_HAS_DIGIT_ORDER: add_chunk and add_chunk_lanes take digits in another order, see avx2/codes.h.
#ifndef HQQTENSOR_HAS_DIGIT_ORDER
// Puts [count][64] digits of a chunk into the order for codes of so many bits. lanes: for add_chunk_lanes.
inline void order_digits(int, int, bool, int8_t*) {}
#endif

// HQQTENSOR_HAS_SPANS: groups of 20 codes that are multiplied 16 at a time, see avx512/spans.h.
#ifndef HQQTENSOR_HAS_SPANS
inline bool spans_serve(const Weight&, int) { return false; }
inline bool quantize_spans(const float*, int64_t, float, int64_t, const QuantizedActivations&) { return false; }
#endif

// float f_largest(p, count): the largest magnitude of `count` numbers, a multiple of 8; NaN if one of them is.
// HQQTENSOR_HAS_CHUNK_STORE: the set has both functions below in place of it.
#ifndef HQQTENSOR_HAS_CHUNK_STORE
// The largest magnitude of each of `count` chunks of 64 numbers, into top[16]: zero behind the last; NaN where one is NaN.
inline void f_largest_each(const float* p, int64_t count, float* top) {
  for (int64_t c = 0; c < 16; ++c) top[c] = c < count ? f_largest(p + 64 * c, 64) : 0;
}
// A chunk of 64 numbers times `scale`, rounded to integers of COUNT digits of 8 bits; digits lie 64 bytes apart.
template <int COUNT>
inline void f_store_chunk(int8_t* out, const float* in, float scale) {
  for (int i = 0; i < 64; i += kFloats) f_store_digits(out + i, f_mul(f_load(in + i), f_set(scale)), 8, COUNT, 64, 4);
}
#endif

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
