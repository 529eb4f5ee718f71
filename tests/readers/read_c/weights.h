// Quantized weights of the files in safetensors.h as dense numbers, and the file that holds them.
#pragma once
#include "entry.h"

static Text subject;  // the weight that is being read, for messages

// ---- Numbers ----

static float float_of_bits(uint32_t bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static uint32_t bits_of_float(float value) {
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
}

static float from_half(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FF;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000 | fraction << 13);
  if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = (float)fraction * 0x1p-24f;
  return sign ? -tiny : tiny;
}

// `value` as the nearest float16, of two the even one.
static float rounded_to_half(float value) {
  const float size = value < 0 ? -value : value;
  if (!(size < 65520.0f)) return value - value == 0 ? float_of_bits((bits_of_float(value) & 0x80000000) | 0x7F800000) : value;
  // Adding and subtracting a power of two leaves the bits that float16 has for numbers of this size.
  int exponent = (int)(bits_of_float(size) >> 23) - 127;
  if (exponent < -14) exponent = -14;
  const float shift = float_of_bits((uint32_t)(exponent + 13 + 127) << 23) * 1.5f;
  const volatile float moved = size + shift;
  return float_of_bits(bits_of_float(moved - shift) | (bits_of_float(value) & 0x80000000));
}

static float rounded_to_bfloat(float value) {
  if (value != value) return value;
  const uint32_t bits = bits_of_float(value);
  return float_of_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

static float rounded(float value, Dtype dtype) {
  return dtype == FLOAT16 ? rounded_to_half(value) : dtype == BFLOAT16 ? rounded_to_bfloat(value) : value;
}

// The numbers of a part that is not quantized, which must be finite.
static float* plain_numbers(const Stored* part) {
  float* const out = allocate((size_t)part->count, sizeof(float));
  const int64_t width = bytes_of(part->dtype);
  check(width > 1, "scales and zero points are F16, BF16 or F32");
  for (int64_t i = 0; i < part->count; ++i) {
    const uint8_t* const at = part->data + i * width;
    const uint32_t low = (uint32_t)(at[0] | at[1] << 8);
    out[i] = width == 4                    ? float_of_bits(low | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24)
             : is_text(part->dtype, "F16") ? from_half((uint16_t)low)
                                           : float_of_bits(low << 16);
    check(out[i] - out[i] == 0, "a part holds NaN or Inf");
  }
  return out;
}

// ---- Weights ----

static float* dequantized(const Weight* w, Text prefix);

static Text joined(Text prefix, const char* name, const char* end) {
  const size_t middle = strlen(name), last = strlen(end);
  char* const out = allocate(prefix.length + middle + last, 1);
  if (prefix.length) memcpy(out, prefix.bytes, prefix.length);
  memcpy(out + prefix.length, name, middle);
  memcpy(out + prefix.length + middle, end, last);
  return (Text){out, prefix.length + middle + last};
}

static bool has_shape(const Weight* w, int rank, const int64_t* shape, int64_t rows, int64_t columns) {
  if (rank != w->lead_rank + 2) return false;
  for (int d = 0; d < w->lead_rank; ++d)
    if (shape[d] != w->lead[d]) return false;
  return shape[rank - 2] == rows && shape[rank - 1] == columns;
}

static int64_t up(int64_t count, int64_t size) { return count / size + (count % size != 0); }

// The shape of a part, plain or quantized, before its numbers are read.
static void part_shape(const Weight* w, Text prefix, const char* part, int* rank, int64_t* shape) {
  const Json* const nested = member(w->nested, part);
  if (nested) {
    const Weight inner = parse_entry(nested, true);
    *rank = inner.rank;
    memcpy(shape, inner.shape, sizeof(inner.shape));
  } else {
    const Stored plain = stored(joined(prefix, part, ""));
    *rank = plain.rank;
    memcpy(shape, plain.shape, sizeof(plain.shape));
  }
}

// Scales or zero points: [matrices][rows][columns].
static float* numbers_of(const Weight* w, Text prefix, const char* part, int64_t rows, int64_t columns) {
  int rank;
  int64_t shape[MOST_RANK];
  part_shape(w, prefix, part, &rank, shape);
  check(has_shape(w, rank, shape, rows, columns), "a part has another shape than the weight asks for");
  const Json* const nested = member(w->nested, part);
  if (nested) {
    const Weight inner = parse_entry(nested, true);
    return dequantized(&inner, joined(prefix, part, "_"));
  }
  const Stored plain = stored(joined(prefix, part, ""));
  return plain_numbers(&plain);
}

// One row of packed codes; `row` moves on to the next.
static void unpack(const uint8_t** row, int nbits, int64_t K, bool filled_up, uint8_t* codes) {
  for (int64_t first = 0; first < K; first += 128) {
    const int64_t count = K - first < 128 ? K - first : 128, block = filled_up ? up(count, 8) * 8 : count;
    memset(codes + first, 0, (size_t)count);
    int low = 0;
    for (int plane = 8; plane; plane /= 2) {
      if (!(nbits & plane)) continue;  // the planes of a width are its powers of two
      const int64_t bytes = up(block * plane, 8);
      for (int64_t c = 0; c < count; ++c)
        codes[first + c] |= (uint8_t)(((*row)[c % bytes] >> plane * (c / bytes) & ((1 << plane) - 1)) << low);
      *row += bytes, low += plane;
    }
  }
}

static float minifloat(int code, int exponent_bits, int mantissa_bits, int bias) {
  const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1), fraction = code & ((1 << mantissa_bits) - 1);
  float value = (float)fraction / (float)(1 << mantissa_bits) + (exponent ? 1 : 0);
  for (int i = exponent ? exponent : 1; i < bias; ++i) value /= 2;
  for (int i = bias; i < exponent; ++i) value *= 2;
  return code >> (exponent_bits + mantissa_bits) ? -value : value;
}

static void fill_table(Format format, float* table) {
  static const float nf4[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
  for (int code = 0; code < 256; ++code) {
    table[code] = format == NF4   ? nf4[code % 16]
                  : format == FP4 ? minifloat(code % 16, 2, 1, 1)
                  : format == FP6 ? minifloat(code % 64, 3, 2, 3)
                                  : minifloat(code, 4, 3, 7);
    if (format == FP8 && code % 128 == 127) table[code] = float_of_bits(0x7FC00000);
  }
}

static void rotate(float* row, int64_t K, int64_t size) {
  int64_t power = size;
  float factor = 1;  // size ** -0.5
  for (; power >= 4; power /= 4) factor /= 2;
  if (power == 2) factor *= 0.70710678118654752440f;
  for (int64_t run = 1; run < size; run *= 2)
    for (int64_t start = 0; start < K; start += 2 * run)
      for (int64_t i = start; i < start + run; ++i) {
        const float x = row[i], y = row[i + run];
        row[i] = x + y, row[i + run] = x - y;
      }
  for (int64_t k = 0; k < K; ++k) row[k] *= factor;
}

// [matrices][N][K] in float32, before it is rounded to the dtype.
static float* dequantized(const Weight* w, Text prefix) {
  const Stored qdata = stored(joined(prefix, "qdata", ""));
  const int64_t width = w->is_nested ? (w->nbits == 8 ? w->K : w->K / 128 * 64 + up(w->K % 128, 2)) : up(w->K, 8) * w->nbits;
  check(is_text(qdata.dtype, "U8") && has_shape(w, qdata.rank, qdata.shape, w->N, width), "qdata has another dtype or shape");
  int64_t groups = up(w->axis ? w->K : w->N, w->group_size);
  if (!w->axis) {
    int rank;
    int64_t shape[MOST_RANK];
    part_shape(w, prefix, "scale", &rank, shape);
    if (groups < 1) groups = 1;
    if (rank >= 2 && shape[rank - 2] > groups) groups = shape[rank - 2];
  }
  const int64_t rows = w->axis ? w->N : groups, columns = w->axis ? groups : w->K;
  const float *const scales = numbers_of(w, prefix, "scale", rows, columns), *zeros = NULL;
  const int64_t entries = (int64_t)1 << w->nbits, tables = w->row_codebook ? w->N : 1;
  float table[256];
  if (w->format == INT) {
    zeros = numbers_of(w, prefix, "zero_point", rows, columns);
  } else if (w->format == CODEBOOK) {
    zeros = numbers_of(w, prefix, "zero_point", tables, entries);
  } else {
    fill_table(w->format, table);
  }
  if (!qdata.count) return allocate(1, sizeof(float));  // no weights: then sizes may be of any magnitude
  const int64_t all_rows = w->matrices * w->N;
  float* const out = allocate((size_t)(all_rows * w->K), sizeof(float));
  uint8_t* const codes = allocate((size_t)w->K, 1);
  const uint8_t* packed = qdata.data;
  for (int64_t r = 0; r < all_rows; ++r) {
    const int64_t matrix = r / w->N, n = r % w->N;
    unpack(&packed, w->nbits, w->K, !w->is_nested, codes);
    for (int64_t k = 0; k < w->K; ++k) {
      const int64_t at = matrix * rows * columns + (w->axis ? n * columns + k / w->group_size : n % groups * columns + k);
      const float value = w->format == INT        ? (float)codes[k] - zeros[at]
                          : w->format == CODEBOOK ? zeros[(matrix * tables + (w->row_codebook ? n : 0)) * entries + codes[k]]
                                                  : table[codes[k]];
      out[r * w->K + k] = value * scales[at];
    }
    if (w->rotation) rotate(out + r * w->K, w->K, w->rotation);
  }
  return out;
}

// ---- Output ----

typedef struct Dense {
  Text name;
  Weight weight;
  float* values;               // [matrices][N][K]
  const float* act_pre_scale;  // [K] or NULL
} Dense;

static int64_t count_of(const Dense* d) { return d->weight.matrices * d->weight.N * d->weight.K; }

static int compare_names(const void* a, const void* b) { return compare_texts(*(const Text*)a, *(const Text*)b); }

// The names of a JSON list of texts, in order, none of them twice.
static Text* sorted_names(const Json* list) {
  check(list->kind == JSON_ARRAY, "tensor_names must be a list");
  Text* const names = allocate(list->count, sizeof(Text));
  for (size_t i = 0; i < list->count; ++i) {
    check(list->children[i]->kind == JSON_STRING, "tensor_names must be texts");
    names[i] = list->children[i]->string;
  }
  qsort(names, list->count, sizeof(Text), compare_names);
  for (size_t i = 1; i < list->count; ++i) check(compare_texts(names[i - 1], names[i]) != 0, "tensor_names has one name twice");
  return names;
}

static Dense read_weight(Text name, Text text) {
  subject = name;
  const Json *const entry = parse_json(text), *const type = member(entry, "_type");
  check(type && type->kind == JSON_STRING && is_text(type->string, "HQQTensor"), "metadata is not of an HQQTensor");
  size_t dot = name.length;
  while (dot && name.bytes[dot - 1] != '.') --dot;
  const Text leaf = {name.bytes + dot, name.length - dot}, with_dash = joined((Text){name.bytes, dot}, "_", "");
  char* const prefix = allocate(with_dash.length + leaf.length + 1, 1);
  memcpy(prefix, with_dash.bytes, with_dash.length);
  if (leaf.length) memcpy(prefix + with_dash.length, leaf.bytes, leaf.length);
  prefix[with_dash.length + leaf.length] = '_';
  const Text key = {prefix, with_dash.length + leaf.length + 1};
  Dense out = {.name = name, .weight = parse_entry(entry, false)};
  out.values = dequantized(&out.weight, key);
  if (out.weight.has_act_pre_scale) {
    const Stored part = stored(joined(key, "act_pre_scale", ""));
    check(part.rank == 1 && part.shape[0] == out.weight.K, "act_pre_scale has another shape");
    out.act_pre_scale = plain_numbers(&part);
  }
  subject.length = 0;
  return out;
}

static void put_bytes(FILE* out, uint64_t value, int count) {
  for (int i = 0; i < count; ++i) fputc((int)(value >> 8 * i & 255), out);
}

static void put_text(FILE* out, Text text) {
  for (size_t i = 0; i < text.length; ++i) {
    const unsigned char c = (unsigned char)text.bytes[i];
    fprintf(out, c < 0x20 || c == '"' || c == '\\' ? "\\u%04x" : "%c", c);
  }
}

// The numbers in the order of the shape, as float32; those of the dtype float64 as that.
static void put_values(FILE* out, const Dense* d) {
  const Weight* const w = &d->weight;
  const int64_t count = count_of(d), matrix = w->N * w->K;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t inside = i % matrix, n = w->transposed ? inside % w->N : inside / w->K;
    const int64_t k = w->transposed ? inside / w->N : inside % w->K;
    const float value = rounded(d->values[i / matrix * matrix + n * w->K + k], w->dtype);
    const float factor = d->act_pre_scale ? rounded(d->act_pre_scale[k], w->dtype) : 1;
    if (w->dtype == FLOAT64) {
      const double wide = (double)value * (double)factor;
      uint64_t bits;
      memcpy(&bits, &wide, 8);
      put_bytes(out, bits, 8);
    } else {
      put_bytes(out, bits_of_float(rounded(value * factor, w->dtype)), 4);
    }
  }
}

static void put_header(FILE* out, const Dense* all, size_t count) {
  int64_t at = 0;
  fputc('{', out);
  for (size_t i = 0; i < count; ++i) {
    const Weight* const w = &all[i].weight;
    const int64_t end = at + count_of(&all[i]) * (w->dtype == FLOAT64 ? 8 : 4);
    fprintf(out, "%s\"", i ? ", " : "");
    put_text(out, all[i].name);
    fprintf(out, "\": {\"dtype\": \"%s\", \"shape\": [", w->dtype == FLOAT64 ? "F64" : "F32");
    for (int d = 0; d < w->rank; ++d) fprintf(out, "%s%lld", d ? ", " : "", (long long)w->shape[d]);
    fprintf(out, "], \"data_offsets\": [%lld, %lld]}", (long long)at, (long long)end);
    at = end;
  }
  fputc('}', out);
}

static void check_version(const Json* metadata) {
  const Json* const text = member(metadata, "hqqtensor");
  if (!text) return;
  check(text->kind == JSON_STRING, "the metadata's hqqtensor must be a text");
  const Json* const version = member(parse_json(text->string), "version");
  check(version && version->kind == JSON_INTEGER && version->integer == 1, "a format version that is not read here");
}

// Writes the weights of `files` to `out`, a safetensors file.
static void write_dense(FILE* out) {
  for (int i = 0; i < file_count; ++i) check_version(member(files[i].header, "__metadata__"));
  // Each file has the metadata of all weights.
  const Json *const metadata = member(files[0].header, "__metadata__"), *const names = member(metadata, "tensor_names");
  check(names && names->kind == JSON_STRING, "the metadata has no tensor_names");
  const Json* const list = parse_json(names->string);
  const Text* const sorted = sorted_names(list);
  Dense* const all = allocate(list->count, sizeof(Dense));
  size_t weights = 0;
  for (size_t i = 0; i < list->count; ++i) {
    const Json* const entry = child_of(metadata, sorted[i]);
    if (!entry || entry->kind != JSON_STRING) continue;
    const Json* const type = member(parse_json(entry->string), "_type");
    if (type && type->kind == JSON_STRING && is_text(type->string, "HQQTensor"))
      all[weights++] = read_weight(sorted[i], entry->string);
  }
  char* header = NULL;
  size_t size = 0;
  FILE* const text = open_memstream(&header, &size);
  check(text != NULL, "out of memory");
  put_header(text, all, weights);
  check(fclose(text) == 0, "out of memory");
  put_bytes(out, size, 8);
  fwrite(header, 1, size, out);
  free(header);
  for (size_t i = 0; i < weights; ++i) put_values(out, &all[i]);
}
