// The entry of a quantized weight: its attributes, each checked, and the geometry that they give.
#pragma once
#include "safetensors.h"

#define LARGEST ((int64_t)1 << 40)

typedef enum Dtype { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 } Dtype;

typedef enum Format { INT, NF4, FP4, FP6, FP8, CODEBOOK } Format;

typedef struct Weight {
  Format format;
  int nbits, axis, rank, row_dims;
  bool transposed, row_codebook, has_act_pre_scale, is_nested;
  Dtype dtype;
  int64_t shape[MOST_RANK], group_size, rotation;
  int64_t lead[MOST_RANK], matrices;  // dimensions before those of a matrix, and their product
  int lead_rank;
  int64_t N, K;
  const Json* nested;  // entries by part, or NULL
} Weight;

// The place of a text in a list that ends with NULL.
static int choice(const Json* value, const char* const* names, const char* what) {
  check(value && value->kind == JSON_STRING, what);
  for (int i = 0; names[i]; ++i)
    if (is_text(value->string, names[i])) return i;
  fail(what);
}

static void check_part_names(const Json* names, Weight* w) {
  check(names && names->kind == JSON_ARRAY, "_tensor_data_names must be a list");
  static const char* const known[] = {"qdata", "scale", "zero_point", "act_pre_scale", NULL};
  int seen[4] = {0};
  for (size_t i = 0; i < names->count; ++i) ++seen[choice(names->children[i], known, "a part that is not known here")];
  const int zero_points = w->format == INT || w->format == CODEBOOK;
  check(seen[0] == 1 && seen[1] == 1 && seen[2] == zero_points && seen[3] <= !w->is_nested, "_tensor_data_names do not fit");
  w->has_act_pre_scale = seen[3];
}

static Weight parse_entry(const Json* entry, bool is_nested) {
  Weight w = {.is_nested = is_nested, .matrices = 1, .K = 1, .nested = member(entry, "_nested")};
  const Json *const data = member(entry, "_data"), *value;
  static const char* const known[] = {"nbits",    "group_size", "axis",       "shape",    "dtype",
                                      "format",   "transposed", "activation", "rotation", "view_as_float",
                                      "row_dims", "codebook",   NULL};
  check(data && data->kind == JSON_OBJECT, "has no _data");
  for (size_t i = 0; i < data->count; ++i)
    choice(&(Json){.kind = JSON_STRING, .string = data->children[i]->name}, known, "_data has a key that is not known here");
  w.format = (Format)choice(member(data, "format"), (const char* const[]){"int", "nf4", "fp4", "fp6", "fp8", "codebook", NULL},
                            "format is not known here");
  w.nbits = (int)whole(member(data, "nbits"), 8, "nbits must be 1 to 8");
  static const int least[] = {1, 4, 4, 6, 8, 1}, most[] = {8, 4, 4, 6, 8, 4};
  check(w.nbits >= least[w.format] && w.nbits <= most[w.format], "the format does not have that many bits");
  w.axis = (int)whole(member(data, "axis"), 1, "axis must be 0 or 1");
  w.group_size = whole(member(data, "group_size"), LARGEST, "group_size must be 1 to 2^40");
  check(w.group_size > 0, "group_size must be 1 to 2^40");
  value = member(data, "dtype");
  if (value && value->kind == JSON_OBJECT) value = member(value, "_data");  // as torchao writes it
  w.dtype =
      (Dtype)choice(value, (const char* const[]){"float32", "float16", "bfloat16", "float64", NULL}, "dtype is not known here");
  value = member(data, "transposed");
  check(value && value->kind == JSON_BOOLEAN, "transposed must be true or false");
  w.transposed = value->truth;
  if ((value = member(data, "activation")))
    choice(value, (const char* const[]){"float", "exact", "int8", NULL}, "activation is not known here");
  value = member(data, "view_as_float");
  if (value && value->kind != JSON_NULL)
    choice(value, (const char* const[]){"float32", "float16", "bfloat16", NULL}, "view_as_float is not known here");
  value = member(data, "codebook");
  check((value != NULL) == (w.format == CODEBOOK), "codebook goes with the format codebook alone");
  if (value) w.row_codebook = choice(value, (const char* const[]){"tensor", "row", NULL}, "codebook must be tensor or row");

  const Json* const shape = member(data, "shape");
  check(shape && shape->kind == JSON_ARRAY && shape->count >= 2 && shape->count <= MOST_RANK, "shape must have 2 to 8 numbers");
  w.rank = (int)shape->count;
  int64_t product = 1;
  for (int d = 0; d < w.rank; ++d) {
    w.shape[d] = whole(shape->children[d], LARGEST, "shape must be whole numbers up to 2^40");
    const int64_t factor = w.shape[d] ? w.shape[d] : 1;
    check(!__builtin_mul_overflow(product, factor, &product) && product < (int64_t)1 << 62, "shape is too large");
  }
  value = member(data, "row_dims");
  w.row_dims = value ? (int)whole(value, MOST_RANK, "row_dims must be 1, or all dimensions but the first") : 1;
  check(w.row_dims == 1 || (w.row_dims == w.rank - 1 && !w.transposed), "row_dims must be 1, or all dimensions but the first");
  w.lead_rank = w.rank - w.row_dims - 1;
  for (int d = 0; d < w.lead_rank; ++d) w.matrices *= w.lead[d] = w.shape[d];
  w.N = w.shape[w.lead_rank];
  for (int d = w.lead_rank + 1; d < w.rank; ++d) w.K *= w.shape[d];
  if (w.transposed) {
    const int64_t rows = w.N;
    w.N = w.K, w.K = rows;
  }
  value = member(data, "rotation");
  w.rotation = value ? whole(value, LARGEST, "rotation must be a power of two, or 0") : 0;
  check(!(w.rotation & (w.rotation - 1)) && (!w.rotation || w.K % w.rotation == 0),
        "rotation must be a power of two that divides K");
  check_part_names(member(entry, "_tensor_data_names"), &w);
  if (is_nested)
    check(w.format == INT && (w.nbits == 8 || w.nbits == 4) && w.axis == 0 && !w.transposed && w.row_dims == 1 && !w.rotation &&
              !w.nested && w.dtype == FLOAT32,
          "quantized scales and zero points are integers of 8 or 4 bits, axis 0");
  if (!w.nested) return w;
  check(w.nested->kind == JSON_OBJECT, "_nested must be an object");
  for (size_t i = 0; i < w.nested->count; ++i) {
    const Text part = w.nested->children[i]->name;
    check(is_text(part, "scale") || (is_text(part, "zero_point") && w.format == INT),
          "_nested has a part that is never quantized");
  }
  return w;
}
