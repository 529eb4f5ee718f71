// Files and their tensors. The header may claim anything: every number in it is held against the file.
#pragma once
#include "json.h"

#define MOST_RANK 8

static void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

typedef struct File {
  const uint8_t* data;  // behind the header
  size_t size;
  Json* header;
} File;

static File* files;
static int file_count;

// A whole number from 0 to `most`.
static int64_t whole(const Json* value, int64_t most, const char* what) {
  check(value && value->kind == JSON_INTEGER && value->integer >= 0 && value->integer <= most, what);
  return value->integer;
}

typedef struct Range {
  int64_t begin, end;
} Range;

static int compare_ranges(const void* a, const void* b) {
  const Range *const x = a, *const y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return (x->end > y->end) - (x->end < y->end);
}

static Range range_of(const Json* entry, size_t size) {
  const Json* const offsets = member(entry, "data_offsets");
  check(offsets && offsets->kind == JSON_ARRAY && offsets->count == 2, "a tensor has no data_offsets");
  const int64_t end = whole(offsets->children[1], (int64_t)size, "a tensor ends behind the file");
  return (Range){whole(offsets->children[0], end, "a tensor begins behind its end"), end};
}

// Tensors must fill the file: bytes that many tensors share would make a small file a large model.
static void check_ranges(const File* file) {
  size_t count = 0;
  int64_t at = 0;
  Range* const ranges = allocate(file->header->count, sizeof(Range));
  for (size_t i = 0; i < file->header->count; ++i)
    if (!is_text(file->header->children[i]->name, "__metadata__"))
      ranges[count++] = range_of(file->header->children[i], file->size);
  qsort(ranges, count, sizeof(Range), compare_ranges);
  for (size_t i = 0; i < count; at = ranges[i++].end)
    check(ranges[i].begin == at, "tensors overlap, or leave bytes between them");
  check(at == (int64_t)file->size, "has bytes behind its last tensor");
}

static File parse_file(const uint8_t* bytes, size_t size) {
  check(size >= 8, "is too short for a header");
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= (uint64_t)bytes[i] << 8 * i;
  check(length <= size - 8, "has a header that is longer than the file");
  const File file = {bytes + 8 + length, size - 8 - (size_t)length, parse_json((Text){(char*)bytes + 8, (size_t)length})};
  check(file.header->kind == JSON_OBJECT, "has a header that is no object");
  check_ranges(&file);
  return file;
}

static inline File open_file(const char* path) {
  FILE* const in = fopen(path, "rb");
  check(in != NULL, "cannot be opened");
  check(fseek(in, 0, SEEK_END) == 0, "is no plain file");
  const long end = ftell(in);
  check(end >= 0 && fseek(in, 0, SEEK_SET) == 0, "is no plain file");
  uint8_t* const bytes = allocate((size_t)end, 1);
  check(fread(bytes, 1, (size_t)end, in) == (size_t)end, "cannot be read");
  fclose(in);
  return parse_file(bytes, (size_t)end);
}

typedef struct Stored {
  Text dtype;
  int rank;
  int64_t shape[MOST_RANK];
  int64_t count;  // of numbers
  const uint8_t* data;
} Stored;

static int64_t bytes_of(Text dtype) {
  return is_text(dtype, "U8") ? 1 : is_text(dtype, "F16") || is_text(dtype, "BF16") ? 2 : is_text(dtype, "F32") ? 4 : 0;
}

// The tensor `name` of any file, its bytes held against its shape.
static Stored stored(Text name) {
  for (int i = 0; i < file_count; ++i) {
    const Json* const entry = child_of(files[i].header, name);
    if (!entry) continue;
    Stored out = {.count = 1};
    const Json *const dtype = member(entry, "dtype"), *const shape = member(entry, "shape");
    check(dtype && dtype->kind == JSON_STRING && bytes_of(dtype->string), "a part has a dtype that no part has");
    check(shape && shape->kind == JSON_ARRAY && shape->count <= MOST_RANK, "a part has no shape of up to 8 numbers");
    const Range range = range_of(entry, files[i].size);
    out.dtype = dtype->string, out.rank = (int)shape->count, out.data = files[i].data + range.begin;
    int64_t bytes;
    for (int d = 0; d < out.rank; ++d) {
      out.shape[d] = whole(shape->children[d], INT64_MAX, "a part has a shape that is no whole numbers");
      check(!__builtin_mul_overflow(out.count, out.shape[d], &out.count), "a part has too large a shape");
    }
    check(!__builtin_mul_overflow(out.count, bytes_of(out.dtype), &bytes) && bytes == range.end - range.begin,
          "a part has other bytes than its shape asks for");
    return out;
  }
  fail("a part is missing");
}
