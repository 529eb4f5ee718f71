// Integers of up to 4 bits whose groups fill whole chunks: several blocks at a time, all their codes summed before one
// conversion and one multiplication by the scales.
//
// A step is 4 blocks of 1 bit, 2 of the other widths. Each block has its own lanes of the vector (4 or 8), and each lane has
// codes of one half of the block, so of one group. Codes stay where they are in their bytes, at the same bit in all vectors
// of a lane, so that the sums need no shifts: a lane's factor, a power of two, is taken away at the end of a row. To get at
// the other codes, dwords change their lanes instead of bits their places. In lane l of vector v of a step, with
// i = l % 4, h = l % 2 and bits counted within a byte, are
//   4 bits  dword l ^ (v & 1) of what is put together,  nibble h               v = 0..3; v / 2 of the vectors put together:
//           0 has the first two dwords of every four of both blocks side by side, 1 the last two
//   3 bits  dword l ^ (v & 1) of what is put together,  nibble h               v = 0..3; v / 2 of the vectors put together:
//           0 has positions 0 and 2 of both planes in its nibbles, 1 has 1 and 3
//   2 bits  dword (i + v) % 4 of the same four,         bits 2i and 2i + 1     v = 0..3
//   1 bit   dword (i + v) % 4 of the same four,         bit 2i, from v = 4 on bit 2i + 1     v = 0..7
// (vectors 0 to 3 of 1 bit thus count half as much, which is made up for when they are summed). Activations are put in this
// order once, whole vectors of each digit: [step][v][digit][64].
//
// Four rows take turns at every instruction, and digits are summed apart: a chain of dependent products is as long as a step
// has vectors. The lowest of three digits has its own sum of floats: codes left in place would not fit 32 bits with it.
#pragma once
#include <array>
#include <cstddef>
#include <utility>

#include "avx512/pairs.h"
#include "generic/unrolled.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

#define HQQTENSOR_HAS_WIDE
static_assert(kGemvTokens == 1);

template <int NB>
struct Wide {
  static constexpr bool serve = NB <= 4;
  static constexpr int blocks = NB == 1 ? 4 : 2, vectors = 2 * blocks, lanes = 16 / blocks;

  // Which 4 of a block's 128 codes, counted by fours, lane l of vector v has.
  static constexpr int quad(int v, int l) {
    if (NB == 4) return 16 * (l % 2) + l / 4 * 4 + v / 2 * 2 + (l % 2 ^ v % 2);
    if (NB == 3) return 8 * (2 * (l % 2) + v / 2) + (l % 8 ^ v % 2);
    const int dword = l % lanes / 4 * 4 + (l + v) % 4;
    return NB == 2 ? 8 * (l % 4) + dword : 4 * (2 * (l % 4) + v / 4) + dword;
  }
  static constexpr int block(int l) { return NB == 4 ? l % 4 / 2 : l / lanes; }
  static constexpr __mmask16 lanes_of(int b) {
    int mask = 0;
    for (int l = 0; l < 16; ++l) mask |= (block(l) == b) << l;
    return (__mmask16)mask;
  }
  // The power of two that lane l's sums count too much.
  static constexpr int place(int l) { return NB >= 3 ? 4 * (l % 2) : NB == 2 ? 2 * (l % 4) : 2 * (l % 4) + 1; }

  struct Lanes {
    alignas(64) int32_t v[16];
  };
  template <class F>
  static constexpr Lanes each(F f) {
    Lanes lanes{};
    for (int l = 0; l < 16; ++l) lanes.v[l] = (int32_t)f(l);
    return lanes;
  }
  // f(lane), known when this is compiled.
  template <class F>
  static __m512i by_lane(F) {
    static constexpr Lanes lanes = each(F());
    return _mm512_load_si512(lanes.v);
  }

  // Digits of a step as `quantize_chunks` left them, chunk by chunk, in this order.
  static void order(int8_t* x, int count) {
    static constexpr std::array<Lanes, vectors> from = [] {
      std::array<Lanes, vectors> all{};
      for (int v = 0; v < vectors; ++v) all[v] = each([v](int l) { return quad(v, l); });
      return all;
    }();
    for (int d = 0; d < count; ++d) {
      __m512i in[vectors];
      for (int c = 0; c < vectors; ++c) in[c] = _mm512_load_si512(x + (c * count + d) * 64);
      for (int v = 0; v < vectors; ++v) {
        const __m512i index = _mm512_load_si512(from[v].v);
        __m512i out = _mm512_setzero_si512();
        for (int b = 0; b < blocks; ++b)
          out = _mm512_mask_blend_epi32(lanes_of(b), out, _mm512_permutex2var_epi32(in[2 * b], index, in[2 * b + 1]));
        _mm512_store_si512(x + (v * count + d) * 64, out);
      }
    }
  }

  // The packed bytes that vectors V, V + 1, ... of a step are taken from, their dwords at home.
  static constexpr int vectors_of_load = NB >= 3 ? 2 : vectors;
  template <int V>
  static Codes load(const uint8_t* b) {
    if constexpr (NB == 4) {
      const __m512i one = _mm512_loadu_si512(b), two = _mm512_loadu_si512(b + 64);
      return V == 0 ? _mm512_unpacklo_epi64(one, two) : _mm512_unpackhi_epi64(one, two);
    } else if constexpr (NB == 3) {
      const auto twos = [&](int64_t o) { return _mm256_loadu_si256((const __m256i*)(b + o)); };
      const auto ones = [&](int64_t o) { return _mm_loadu_si128((const __m128i*)(b + o)); };
      const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(twos(0)), twos(48), 1);
      const __m512i high = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(ones(32)), 0xFF00, ones(80));
      if constexpr (V == 0) return select(0x33, low, _mm512_sllv_epi32(high, quarters(2, 1, 2, 1)));
      return select(0x33, _mm512_srli_epi32(low, 2), _mm512_srlv_epi32(high, quarters(0, 1, 0, 1)));
    } else {
      return _mm512_loadu_si512(b);
    }
  }

  template <int V>
  static Codes codes(Codes c) {
    constexpr int rotation = NB >= 3 ? V % 2 : V % 4;
    if constexpr (rotation > 0 && NB >= 3) c = _mm512_shuffle_epi32(c, _MM_PERM_CDAB);
    if constexpr (rotation == 1 && NB < 3) c = _mm512_shuffle_epi32(c, _MM_PERM_ADCB);
    if constexpr (rotation == 2) c = _mm512_shuffle_epi32(c, _MM_PERM_BADC);
    if constexpr (rotation == 3) c = _mm512_shuffle_epi32(c, _MM_PERM_CBAD);
    constexpr int down = NB == 1 && V < 4 ? 1 : 0;
    const auto mask = [](int l) { return (uint32_t)((1 << NB) - 1) * 0x01010101u << (place(l) - down); };
    return _mm512_and_si512(c, by_lane(mask));
  }

  // Sums of the codes of kGemvRows rows times digit d, in a[d]; all of a step.
  template <int D, size_t... V>
  static void dots(const uint8_t* const* rows, int64_t at, const int8_t* x, __m512i (*a)[kGemvRows],
                   std::index_sequence<V...>) {
    Codes bytes[kGemvRows];
    const auto vector = [&]<int I>(std::integral_constant<int, I>) __attribute__((always_inline)) {
      Codes c[kGemvRows];
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
        if constexpr (I % vectors_of_load == 0) bytes[r] = load<I>(rows[r] + at);
        c[r] = codes<I>(bytes[r]);
      });
      for (int d = 0; d < D; ++d) {
        const __m512i t = _mm512_load_si512(x + (I * D + d) * 64);
        unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
          if (NB == 1 && I == 4) a[d][r] = _mm512_add_epi32(a[d][r], a[d][r]);
          a[d][r] = _mm512_dpbusd_epi32(a[d][r], c[r], t);
        });
      }
    };
    (vector(std::integral_constant<int, (int)V>()), ...);
  }

  // A scale for each half of each block of a step.
  static __m512 scales(const float* s) {
    if constexpr (NB == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(s));
    return _mm512_permutexvar_ps(by_lane([](int l) { return l / lanes * 2 + quad(0, l) / 16; }), _mm512_loadu_ps(s));
  }

  // The first `count` blocks of kGemvRows rows, whole steps. prefetch_block(b): called for each block.
  template <int D, class Prefetch>
  static void run(const uint8_t* const* rows, const int8_t* x, const float* const* scale, int64_t count, Acc* out,
                  Prefetch prefetch_block) {
    __m512 acc[kGemvRows], last[kGemvRows];
    unrolled<kGemvRows>([&](auto r) { acc[r] = last[r] = _mm512_setzero_ps(); });
    for (int64_t b = 0; b < count; b += blocks) {
      for (int i = 0; i < blocks; ++i) prefetch_block(b + i);
      __m512i a[D][kGemvRows];
      for (int d = 0; d < D; ++d) unrolled<kGemvRows>([&](auto r) { a[d][r] = _mm512_setzero_si512(); });
      dots<D>(rows, b * 16 * NB, x + b * D * 128, a, std::make_index_sequence<vectors>());
      unrolled<kGemvRows>([&](auto r) __attribute__((always_inline)) {
        const __m512 s = scales(scale[r] + 2 * b);
        acc[r] = scaled(acc[r], D == 1 ? a[0][r] : _mm512_add_epi32(_mm512_slli_epi32(a[0][r], 8), a[D > 1][r]), s);
        if constexpr (D == 3) last[r] = scaled(last[r], a[2][r], s);
      });
    }
    const __m512 factor = _mm512_castsi512_ps(by_lane([](int l) { return (127 - place(l)) << 23; }));
    unrolled<kGemvRows>([&](auto r) {
      if constexpr (D == 3) acc[r] = _mm512_fmadd_ps(acc[r], _mm512_set1_ps(256), last[r]);
      out[r].v = _mm512_mul_ps(acc[r], factor);
    });
  }
};

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
