// JSON as a tree, for texts that may come from anybody: nesting is bounded, and a name may occur once in an object.
// Texts may hold any bytes, also zero bytes, so each goes with its length.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Text {
  const char* bytes;
  size_t length;
} Text;

typedef enum Kind { JSON_NULL, JSON_BOOLEAN, JSON_INTEGER, JSON_FRACTION, JSON_STRING, JSON_ARRAY, JSON_OBJECT } Kind;

typedef struct Json {
  Kind kind;
  bool truth;              // of JSON_BOOLEAN
  int64_t integer;         // of JSON_INTEGER
  Text string;             // of JSON_STRING, without escapes
  size_t count;            // of the children of an array or object
  struct Json** children;  // of an object in the order of their names
  Text name;               // of a child of an object
} Json;

#define JSON_MOST_DEPTH 64

// Refuses the file for this reason; defined by the program.
_Noreturn void fail(const char* what);

// All that was allocated, so that a program that reads many files can free it.
static void** allocated;
static size_t allocated_count, allocated_room;

static void* allocate(size_t count, size_t size) {
  if (size && count > SIZE_MAX / 2 / size) fail("too large for this machine's memory");
  if (allocated_count == allocated_room) {
    const size_t more = allocated_room ? 2 * allocated_room : 64;
    void** const list = realloc(allocated, more * sizeof(void*));
    if (!list) fail("out of memory");
    allocated = list, allocated_room = more;
  }
  void* const memory = calloc(count ? count : 1, size ? size : 1);
  if (!memory) fail("out of memory");
  return allocated[allocated_count++] = memory;
}

static inline void free_all(void) {
  while (allocated_count) free(allocated[--allocated_count]);
}

static int compare_texts(Text a, Text b) {
  const size_t shorter = a.length < b.length ? a.length : b.length;
  const int order = shorter ? memcmp(a.bytes, b.bytes, shorter) : 0;
  return order ? order : (a.length > b.length) - (a.length < b.length);
}

static inline bool is_text(Text text, const char* wanted) {
  return text.length == strlen(wanted) && memcmp(text.bytes, wanted, text.length) == 0;
}

typedef struct Parser {
  const char *at, *end;
  int depth;
} Parser;

static Json* parse_value(Parser* p);

static void skip_space(Parser* p) {
  while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t')) ++p->at;
}

static bool take(Parser* p, char wanted) {
  skip_space(p);
  if (p->at == p->end || *p->at != wanted) return false;
  ++p->at;
  return true;
}

static void need(Parser* p, char wanted) {
  if (!take(p, wanted)) fail("JSON that is not well formed");
}

static unsigned parse_hex(Parser* p) {
  unsigned value = 0;
  for (int i = 0; i < 4; ++i) {
    if (p->at == p->end) fail("JSON that is not well formed");
    const char c = *p->at++;
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) fail("JSON with a bad \\u escape");
    value = value * 16 + (unsigned)digit;
  }
  return value;
}

// The character behind \u as UTF-8; never longer than the escape itself.
static char* put_character(Parser* p, char* out) {
  unsigned c = parse_hex(p);
  if (c >= 0xDC00 && c < 0xE000) fail("JSON with half a surrogate pair");
  if (c >= 0xD800 && c < 0xDC00) {
    if (p->end - p->at < 2 || p->at[0] != '\\' || p->at[1] != 'u') fail("JSON with half a surrogate pair");
    p->at += 2;
    const unsigned low = parse_hex(p);
    if (low < 0xDC00 || low >= 0xE000) fail("JSON with half a surrogate pair");
    c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
  }
  if (c < 0x80) {
    *out++ = (char)c;
  } else if (c < 0x800) {
    *out++ = (char)(0xC0 | c >> 6), *out++ = (char)(0x80 | (c & 63));
  } else if (c < 0x10000) {
    *out++ = (char)(0xE0 | c >> 12), *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
  } else {
    *out++ = (char)(0xF0 | c >> 18), *out++ = (char)(0x80 | (c >> 12 & 63));
    *out++ = (char)(0x80 | (c >> 6 & 63)), *out++ = (char)(0x80 | (c & 63));
  }
  return out;
}

static Text parse_string(Parser* p) {
  need(p, '"');
  const char* close = p->at;
  while (close < p->end && *close != '"') close += *close == '\\' && close + 1 < p->end ? 2 : 1;
  if (close >= p->end) fail("JSON that ends within a text");
  char *const start = allocate((size_t)(close - p->at), 1), *out = start;
  while (p->at < close) {
    const char c = *p->at++;
    if ((unsigned char)c < 0x20) fail("JSON with a control character in a text");
    if (c != '\\') {
      *out++ = c;
      continue;
    }
    const char escaped = *p->at++;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char* const known = escaped ? strchr(from, escaped) : NULL;
    if (known)
      *out++ = to[known - from];
    else if (escaped == 'u')
      out = put_character(p, out);
    else
      fail("JSON with an unknown escape");
  }
  if (p->at != close) fail("JSON with a bad \\u escape");
  ++p->at;
  return (Text){start, (size_t)(out - start)};
}

static size_t take_digits(Parser* p) {
  const char* const start = p->at;
  while (p->at < p->end && *p->at >= '0' && *p->at <= '9') ++p->at;
  return (size_t)(p->at - start);
}

static void parse_number(Parser* p, Json* out) {
  const bool negative = *p->at == '-';
  p->at += negative;
  const char* digit = p->at;
  const size_t digits = take_digits(p);
  if (!digits || (digits > 1 && *digit == '0')) fail("JSON with a bad number");
  out->kind = JSON_INTEGER;
  if (p->at < p->end && *p->at == '.') {
    ++p->at, out->kind = JSON_FRACTION;
    if (!take_digits(p)) fail("JSON with a bad number");
  }
  if (p->at < p->end && (*p->at == 'e' || *p->at == 'E')) {
    ++p->at, out->kind = JSON_FRACTION;
    if (p->at < p->end && (*p->at == '+' || *p->at == '-')) ++p->at;
    if (!take_digits(p)) fail("JSON with a bad number");
  }
  if (out->kind == JSON_FRACTION) return;
  for (; digit < p->at; ++digit) {
    const int value = *digit - '0';
    if (__builtin_mul_overflow(out->integer, 10, &out->integer) ||
        __builtin_add_overflow(out->integer, negative ? -value : value, &out->integer)) {
      out->kind = JSON_FRACTION;  // too large for an integer: no place where one is wanted takes it
      break;
    }
  }
}

static int compare_children(const void* a, const void* b) {
  return compare_texts((*(Json* const*)a)->name, (*(Json* const*)b)->name);
}

static void parse_children(Parser* p, Json* out, char close) {
  if (++p->depth > JSON_MOST_DEPTH) fail("JSON nested too deeply");
  size_t room = 0;
  if (!take(p, close)) {
    do {
      Text name = {NULL, 0};
      if (out->kind == JSON_OBJECT) {
        skip_space(p);
        name = parse_string(p);
        need(p, ':');
      }
      if (out->count == room) {
        room = room ? 2 * room : 4;
        Json** const children = allocate(room, sizeof(Json*));
        if (out->count) memcpy(children, out->children, out->count * sizeof(Json*));
        out->children = children;
      }
      Json* const child = parse_value(p);
      child->name = name;
      out->children[out->count++] = child;
    } while (take(p, ','));
    need(p, close);
  }
  --p->depth;
  if (out->kind == JSON_ARRAY || !out->count) return;
  qsort(out->children, out->count, sizeof(Json*), compare_children);
  for (size_t i = 1; i < out->count; ++i)
    if (compare_texts(out->children[i - 1]->name, out->children[i]->name) == 0) fail("JSON with one name twice");
}

static bool take_word(Parser* p, const char* word) {
  const size_t length = strlen(word);
  if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length) != 0) return false;
  p->at += length;
  return true;
}

static Json* parse_value(Parser* p) {
  Json* const out = allocate(1, sizeof(Json));
  skip_space(p);
  if (p->at == p->end) fail("JSON that ends too early");
  if (*p->at == '"') {
    out->kind = JSON_STRING;
    out->string = parse_string(p);
  } else if (*p->at == '{' || *p->at == '[') {
    out->kind = *p->at == '{' ? JSON_OBJECT : JSON_ARRAY;
    ++p->at;
    parse_children(p, out, out->kind == JSON_OBJECT ? '}' : ']');
  } else if (take_word(p, "true")) {
    out->kind = JSON_BOOLEAN, out->truth = true;
  } else if (take_word(p, "false")) {
    out->kind = JSON_BOOLEAN;
  } else if (!take_word(p, "null")) {
    parse_number(p, out);
  }
  return out;
}

static Json* parse_json(Text text) {
  Parser p = {text.bytes, text.bytes + text.length, 0};
  Json* const out = parse_value(&p);
  skip_space(&p);
  if (p.at != p.end) fail("JSON with something behind its end");
  return out;
}

// The child of that name; NULL if `object` is none, or has no such child.
static Json* child_of(const Json* object, Text name) {
  if (!object || object->kind != JSON_OBJECT) return NULL;
  size_t low = 0, high = object->count;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    const int order = compare_texts(object->children[middle]->name, name);
    if (order == 0) return object->children[middle];
    if (order < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return NULL;
}

static inline Json* member(const Json* object, const char* name) { return child_of(object, (Text){name, strlen(name)}); }
