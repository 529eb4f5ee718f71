#include "torch/weights.h"

#include <array>
#include <atomic>
#include <cmath>
#include <mutex>
#include <string>

#include "torch/table.h"

namespace hqqtensor {
namespace {

// Far beyond any weight, and small enough that no count of bytes or groups made of it overflows.
constexpr int64_t kLargest = (int64_t)1 << 40;

// The distance of the matrices of a tensor in numbers, if they all have one; -1 if not.
int64_t matrix_distance(const Tensor& t) {
  int64_t distance = 0, next = -1;  // next: what the stride of the dimension before must be
  for (int64_t d = t.dim() - 3; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (next < 0)
      distance = t.stride(d);
    else if (t.stride(d) != next)
      return -1;
    next = t.stride(d) * t.size(d);
  }
  return distance;
}

void check_device(const Tensor& t, const char* name) { HQQ_CHECK(t.is_cpu(), name, " is on ", t.device(), ", qdata on cpu"); }

}  // namespace

Matrices matrices_of(const Tensor& t) {
  Matrices m;
  const bool in_place = (t.stride(-1) == 1 || t.size(-1) <= 1) && matrix_distance(t) >= 0;
  if (!in_place) m.copy = converted(t, t.scalar());
  const Tensor& from = in_place ? t : m.copy;
  m.data = (const char*)from.data();
  m.row_stride = from.stride(-2) * from.item_size();
  m.matrix_stride = matrix_distance(from) * from.item_size();
  return m;
}

PackedWeights::PackedWeights(const PackedArguments& a, int rank, int digits) : digits_(digits) {
  read_settings(a);
  read_qdata(a, rank);
  Weight& w = first_;
  const int64_t by_size = (a.axis == 1 ? w.K - 1 : std::max<int64_t>(w.N, 1) - 1) / a.group_size + 1;
  // A slice of rows keeps the groups of an axis-0 weight: there the number of groups is that of the scale's rows.
  const bool has_rows = a.axis == 0 && a.scale.dim() >= 2 && a.scale.size(-2) >= 1;
  w.groups = has_rows ? a.scale.size(-2) : by_size;
  const int64_t rows = a.axis == 1 ? w.N : w.groups, columns = a.axis == 1 ? w.groups : w.K;
  // Groups without a row, of which a slice may have many, and an expanded scale any number, are none.
  if (a.axis == 0) w.groups = std::clamp<int64_t>(w.groups, 1, std::max<int64_t>(w.N, 1));
  w.scale = read_values(a, a.scale, "scale", rows, columns, scale_);
  if (a.format == "int") {
    HQQ_CHECK(a.zero, "format 'int' needs a zero_point, got none");
    w.zero = read_values(a, a.zero, "zero_point", rows, columns, zero_);
  } else {
    read_table(a);
  }
  HQQ_CHECK(a.meta.size() == used_, "meta must have ", (int64_t)used_,
            " tensors, a scale and a zero point for each of scale and zero_point that is uint8; got ", (int64_t)a.meta.size());
}

void PackedWeights::read_settings(const PackedArguments& a) {
  HQQ_CHECK(a.nbits >= 1 && a.nbits <= 8, "nbits must be 1 to 8, got ", a.nbits);
  HQQ_CHECK(a.axis == 0 || a.axis == 1, "axis must be 0 or 1, got ", a.axis);
  HQQ_CHECK(a.group_size >= 1 && a.group_size <= kLargest, "group_size must be 1 to ", kLargest, ", got ", a.group_size);
  HQQ_CHECK(a.in_features >= 1 && a.in_features <= kLargest, "in_features must be 1 to ", kLargest, ", got ", a.in_features);
  first_.K = a.in_features, first_.group_size = a.group_size;
  first_.nbits = (int)a.nbits, first_.axis = (int)a.axis;
}

void PackedWeights::read_qdata(const PackedArguments& a, int rank) {
  const Tensor& q = a.qdata;
  const int64_t bytes = (a.in_features + 7) / 8 * a.nbits;
  const bool fits = (rank ? q.dim() == rank : q.dim() >= 2) && q.size(-1) == bytes && q.scalar() == Scalar::uint8;
  HQQ_CHECK(fits, "qdata must be uint8 ", rank == 2 ? "[N, " : rank == 3 ? "[E, N, " : "[..., N, ", bytes, "], got ", q);
  check_device(q, "qdata");
  leading_.assign(q.sizes().begin(), q.sizes().end() - 2);
  count_ = checked_product(leading_);
  qdata_ = matrices_of(q);
  first_.qdata = (const uint8_t*)qdata_.data;
  first_.row_stride = qdata_.row_stride;
  first_.N = q.size(-2);
}

bool PackedWeights::has_shape(const Tensor& t, int64_t rows, int64_t columns) const {
  return t.dim() == (int64_t)leading_.size() + 2 && t.size(-2) == rows && t.size(-1) == columns &&
         std::equal(leading_.begin(), leading_.end(), t.sizes().begin());
}

std::vector<int64_t> PackedWeights::expected(int64_t rows, int64_t columns) const {
  std::vector<int64_t> sizes = leading_;
  sizes.push_back(rows);
  sizes.push_back(columns);
  return sizes;
}

// Rows of numbers with one stride, or of integers of 8 or 4 bits with their own scale and zero point out of `meta`.
Values PackedWeights::read_values(const PackedArguments& a, const Tensor& t, const char* name, int64_t rows, int64_t columns,
                                  Part& part) {
  const bool quantized = t.scalar() == Scalar::uint8, full = has_shape(t, rows, columns);
  HQQ_CHECK((full && (quantized || is_floating(t.scalar()))) || (quantized && has_shape(t, rows, nibble_bytes(columns))), name,
            " must be floating-point ", expected(rows, columns), ", or uint8 ", expected(rows, columns), " or ",
            expected(rows, nibble_bytes(columns)), ", got ", t);
  check_device(t, name);
  Values v{};
  if (quantized || dtype_of(t.scalar())) {
    part.values = matrices_of(t);
  } else {
    Tensor copy = converted(t, Scalar::float32);
    part.values = matrices_of(copy);
    part.values.copy = std::move(copy);
  }
  v.data = part.values.data, v.stride = part.values.row_stride, v.columns = columns;
  v.type = quantized ? (full ? DType::u8 : DType::u4) : dtype_of(t.scalar()).value_or(DType::f32);
  v.meta_rows = 1;
  if (!quantized) return v;
  HQQ_CHECK(a.meta.size() >= used_ + 2,
            "meta must begin with a scale and a zero point of the uint8 scale, then those of the uint8 "
            "zero_point; got ",
            (int64_t)a.meta.size(), " tensors");
  int64_t zero_rows = 0;
  part.meta_scale = read_meta(a, columns, &v.meta_rows);
  part.meta_zero = read_meta(a, columns, &zero_rows);
  HQQ_CHECK(zero_rows == v.meta_rows, "meta must have a scale and a zero point of one shape, got ", a.meta[used_ - 2], " and ",
            a.meta[used_ - 1]);
  v.meta_scale = (const float*)part.meta_scale.data, v.meta_zero = (const float*)part.meta_zero.data;
  v.meta_stride = columns;
  return v;
}

// The next tensor of `meta`, [..., rows, columns], as contiguous float32.
Matrices PackedWeights::read_meta(const PackedArguments& a, int64_t columns, int64_t* rows) {
  const Tensor& t = a.meta[used_++];
  const std::string name = "meta[" + std::to_string(used_ - 1) + "]";
  *rows = t.dim() >= 2 ? t.size(-2) : 0;
  HQQ_CHECK(is_floating(t.scalar()) && *rows >= 1 && has_shape(t, *rows, columns), name, " must be floating-point ",
            expected(1, columns), " or with more rows, got ", t);
  check_device(t, name.c_str());
  Tensor floats = plain_floats(t);
  Matrices m = matrices_of(floats);
  // One row may have any stride.
  m.row_stride = columns * 4, m.matrix_stride = *rows * columns * 4;
  m.copy = std::move(floats);
  return m;
}

void PackedWeights::read_table(const PackedArguments& a) {
  if (a.format == "codebook") return read_codebook(a);
  HQQ_CHECK(!a.zero, "format '", a.format, "' has no zero_point, got ", a.zero);
  const Table* table = find_table(a.format, a.nbits, digits_);
  HQQ_CHECK(table, "there is no kernel for format '", a.format, "' of ", a.nbits, " bits");
  first_.table = *table;
}

// Entries of one codebook for all, of one for each matrix, or of one for each row.
void PackedWeights::read_codebook(const PackedArguments& a) {
  const int64_t entries = (int64_t)1 << a.nbits;
  const Tensor& t = a.zero;
  const bool shared = t && ((t.dim() == 1 && t.size(0) == entries) || (t.dim() == 2 && t.size(0) == 1 && t.size(1) == entries));
  const bool own = t && (has_shape(t, first_.N, entries) || has_shape(t, 1, entries));
  HQQ_CHECK((shared || own) && is_floating(t.scalar()), "a codebook must be floating-point [", entries, "], ",
            expected(1, entries), " or ", expected(first_.N, entries), ", got ", t);
  check_device(t, "zero_point");
  codebook_.copy = plain_floats(t);
  codebook_.data = (const char*)codebook_.copy.data();
  const int64_t rows = shared ? 1 : t.size(-2);
  codebook_.matrix_stride = shared ? 0 : rows * entries * 4;
  // Digits of a codebook that is not this one are made in `at`.
  if (count_ && first_.N) first_.table = table_of((const float*)codebook_.data, entries, rows > 1 ? 0 : digits_);
  first_.table.stride = rows > 1 ? entries : 0;
}

Weight PackedWeights::at(int64_t i) const {
  Weight w = first_;
  if (i == 0) return w;
  const auto move = [i](const auto*& data, const Matrices& m) {
    if (data) data = (std::remove_reference_t<decltype(data)>)((const char*)data + i * m.matrix_stride);
  };
  const auto move_values = [&move](Values& v, const Part& part) {
    move(v.data, part.values);
    move(v.meta_scale, part.meta_scale);
    move(v.meta_zero, part.meta_zero);
  };
  move(w.qdata, qdata_);
  move_values(w.scale, scale_);
  move_values(w.zero, zero_);
  if (codebook_.matrix_stride) {
    const int64_t stride = w.table.stride;
    const auto* entries = (const float*)(codebook_.data + i * codebook_.matrix_stride);
    w.table = table_of(entries, (int64_t)1 << w.nbits, stride ? 0 : digits_);
    w.table.stride = stride;
  }
  return w;
}

}  // namespace hqqtensor
