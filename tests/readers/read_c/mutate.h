// Small damages to the files of a checkpoint, all drawn from one number.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define MOST_BYTES ((size_t)1 << 20)  // of a file; damages that would make it longer are left out

typedef struct Bytes {
  uint8_t* data;  // room for MOST_BYTES
  size_t size;
} Bytes;

typedef struct Random {
  uint64_t state;
} Random;

static uint64_t next(Random* r) {  // splitmix64
  uint64_t x = r->state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

static size_t below(Random* r, size_t count) { return (size_t)(next(r) % count); }

// `count` bytes at `at` become `size` others.
static void replace(Bytes* b, size_t at, size_t count, const void* with, size_t size) {
  if (b->size - count + size > MOST_BYTES) return;
  uint8_t copy[256];
  if (size > sizeof(copy)) return;
  memcpy(copy, with, size);  // `with` may lie in `b`
  memmove(b->data + at + size, b->data + at + count, b->size - at - count);
  memcpy(b->data + at, copy, size);
  b->size = b->size - count + size;
}

static void damage_bytes(Random* r, Bytes* b) {
  if (!b->size) return;
  static const size_t sizes[] = {1, 1, 2, 4, 8, 16, 64};
  const size_t limits[] = {16, 512, b->size, b->size}, limit = limits[below(r, 4)];
  const size_t at = below(r, limit < b->size ? limit : b->size), left = b->size - at, wanted = sizes[below(r, 7)];
  const size_t size = wanted < left ? wanted : left;
  static const uint8_t fills[] = {0, 0xFF, 0x7F, 0x80, 0x7C};
  switch (below(r, 8)) {
    case 0:
    case 1: b->data[at] ^= (uint8_t)(1 << below(r, 8)); break;
    case 2: b->data[at] = (uint8_t)next(r); break;
    case 3: memset(b->data + at, fills[below(r, 5)], size); break;
    case 4: replace(b, at, size, "", 0); break;
    case 5: replace(b, at, 0, b->data + below(r, b->size - size + 1), size); break;
    case 6: memmove(b->data + at, b->data + below(r, b->size - size + 1), size); break;
    default:
      if (!below(r, 8)) b->size = at;
  }
}

// A run of digits or of letters at or behind a random place of the header; its length, 0 where there is none.
static size_t find_token(Random* r, const Bytes* b, size_t begin, size_t end, size_t* at) {
  const bool wants_digits = below(r, 2);
  for (*at = begin + below(r, end - begin); *at < end; ++*at) {
    size_t last = *at;
    while (last < end && (wants_digits ? b->data[last] >= '0' && b->data[last] <= '9'
                                       : (b->data[last] | 32) >= 'a' && (b->data[last] | 32) <= 'z'))
      ++last;
    if (last > *at) return last - *at < 64 ? last - *at : 64;
  }
  return 0;
}

// A number or a word of the JSON, another in its place: the header stays well formed.
static void damage_token(Random* r, Bytes* b, size_t begin, size_t end) {
  static const char* const numbers[] = {"0",   "1",    "2",    "3",     "4",          "7",          "8",
                                        "9",   "16",   "63",   "64",    "128",        "255",        "4096",
                                        "-1",  "0.5",  "1e3",  "1e999", "4294967296", "2147483648", "1099511627776",
                                        "1.0", "1E-0", "null", "true",  "[]",         "{}",         "9223372036854775807"};
  static const char* const words[] = {"int",  "nf4",   "fp4",     "fp6",        "fp8",   "codebook",   "tensor",
                                      "row",  "float", "float32", "float16",    "I32",   "bfloat16",   "float64",
                                      "F32",  "BF16",  "qdata",   "zero_point", "scale", "act_pre",    "true",
                                      "null", "F16",   "U8",      "HQQTensor",  "axis",  "transposed", "row_dims"};
  size_t at, other;
  const size_t size = find_token(r, b, begin, end, &at);
  if (!size) return;
  const bool digits = b->data[at] >= '0' && b->data[at] <= '9';
  char text[24];
  long long value = 0;
  const char* with = text;
  size_t length = 0;
  switch (below(r, 4)) {
    case 0:
      with = digits ? numbers[below(r, sizeof(numbers) / sizeof(*numbers))] : words[below(r, sizeof(words) / sizeof(*words))];
      length = strlen(with);
      break;
    case 1: length = find_token(r, b, begin, end, &other), with = (const char*)b->data + other; break;
    case 2:
      if (!digits) break;
      for (size_t i = 0; i < size && i < 17; ++i) value = 10 * value + b->data[at + i] - '0';
      value = below(r, 2) ? value + (long long)below(r, 9) - 4 : below(r, 2) ? value * 2 : value / 2;
      length = (size_t)snprintf(text, sizeof(text), "%lld", value);
      break;
    default:  // a comma and what is behind it, up to the next, lost or twice
      while (at > begin && b->data[at] != ',') --at;
      for (other = at + 1; other < end && b->data[other] != ',' && other - at < 200; ++other) {
      }
      if (below(r, 2))
        replace(b, at, other - at, "", 0);
      else
        replace(b, at, 0, b->data + at, other - at);
      return;
  }
  if (length) replace(b, at, size, with, length);
}

static void damage_header(Random* r, Bytes* b) {
  uint64_t length = 0;
  if (b->size < 8) return;
  for (int i = 0; i < 8; ++i) length |= (uint64_t)b->data[i] << 8 * i;
  if (!length || length > b->size - 8) return;
  const size_t before = b->size;
  damage_token(r, b, 8, 8 + (size_t)length);
  length += b->size - before;
  for (int i = 0; i < 8; ++i) b->data[i] = (uint8_t)(length >> 8 * i);
}

static void damage_numbers(Random* r, Bytes* b) {  // behind the header, most likely
  const size_t at = b->size ? b->size - 1 - below(r, b->size < 2000 ? b->size : 2000) : 0;
  if (b->size) b->data[at] = below(r, 2) ? (uint8_t)next(r) : (uint8_t)(b->data[at] ^ 1 << below(r, 8));
}

// One to four damages, to any of the files.
static void damage(Random* r, Bytes* files, size_t count) {
  static const int how_often[] = {1, 1, 1, 2, 4};
  for (int i = how_often[below(r, 5)]; i > 0; --i) {
    Bytes* const file = &files[below(r, count)];
    const size_t kind = below(r, 10);
    if (kind < 5)
      damage_header(r, file);
    else if (kind < 8)
      damage_numbers(r, file);
    else
      damage_bytes(r, file);
  }
}
