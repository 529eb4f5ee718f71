#include "torch/weights.h"

#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace hqqtensor {
namespace {

// Digits for the integer kernels: one where all values are multiples of the smallest, up to 31 of them; else `count` of
// 7 bits, which round values to 2^-14 or 2^-21 of their range.
void add_digits(Table& t, const float* v, int64_t entries, int count) {
  float low = v[0], high = v[0], smallest = INFINITY;
  for (int64_t i = 0; i < entries; ++i) {
    low = std::min(low, v[i]);
    high = std::max(high, v[i]);
    if (v[i] != 0) smallest = std::min(smallest, std::fabs(v[i]));
  }
  bool whole = high > low && (high - low) / smallest <= 31;
  for (int64_t i = 0; whole && i < entries; ++i) whole = v[i] / smallest == std::rint(v[i] / smallest);
  t.count = whole ? 1 : count;
  t.unit = whole ? smallest : (high > low ? high - low : 1.0f) / (float)((1 << (7 * count)) - 1);
  t.offset = -low / t.unit;
  for (int64_t i = 0; i < entries; ++i) {
    int64_t number = std::llrint((double)(v[i] - low) / (double)t.unit);
    for (int d = t.count - 1; d >= 0; --d, number >>= 7) t.digits[d][i] = (uint8_t)(number & 127);
  }
}

Table table_of(const float* values, int64_t entries, int digits) {
  Table t{};
  t.values = values;
  if (entries <= 16 && digits) add_digits(t, values, entries, digits == 3 ? 3 : 2);
  return t;
}

struct NamedTable {
  std::vector<float> values;
  std::array<Table, 4> by_digits;  // of the activations
};

std::mutex tables_lock;
std::map<std::pair<std::string, int64_t>, std::unique_ptr<const NamedTable>>& tables() {
  static auto* const all = new std::map<std::pair<std::string, int64_t>, std::unique_ptr<const NamedTable>>();
  return *all;
}

const NamedTable* find_table(c10::string_view format, int64_t nbits) {
  const std::lock_guard<std::mutex> hold(tables_lock);
  const auto found = tables().find({std::string(format), nbits});
  return found == tables().end() ? nullptr : found->second.get();  // entries are never taken away
}

// Rows of numbers with one stride, or of integers of 8 or 4 bits with their own scale and zero point out of `meta`.
Values values_of(at::Tensor& t, const char* name, int64_t rows, int64_t columns, at::TensorList meta, size_t& used,
                 at::Tensor* own) {
  const bool quantized = t.scalar_type() == at::kByte;
  const auto sizes = t.sizes();
  TORCH_CHECK(sizes.size() == 2 && sizes[0] == rows &&
                  (sizes[1] == columns || (quantized && sizes[1] == nibble_bytes(columns))),
              name, " has shape ", sizes, ", expected ", rows, " x ", columns,
              quantized ? " bytes, or " + std::to_string(nibble_bytes(columns)) + " where a number has 4 bits" : "");
  if (!quantized && !dtype_of(t.scalar_type())) t = t.to(at::kFloat);
  if (t.stride(1) != 1 && t.size(1) > 1) t = t.contiguous();
  const int64_t stride = t.stride(0) * t.element_size();
  if (!quantized) return {t.const_data_ptr(), *dtype_of(t.scalar_type()), columns, stride, nullptr, nullptr, 1, 0};
  TORCH_CHECK(meta.size() >= used + 2, "quantized scales need their own scale and zero point in meta");
  for (int i = 0; i < 2; ++i) own[i] = meta[used++].to(at::kFloat).contiguous();
  TORCH_CHECK(own[0].dim() == 2 && own[0].sizes() == own[1].sizes() && own[0].size(0) >= 1 && own[0].size(1) == columns,
              "meta must be two tensors [rows, ", columns, "], got ", own[0].sizes(), " and ", own[1].sizes());
  return {t.const_data_ptr(), t.size(1) == columns ? DType::u8 : DType::u4, columns, stride, own[0].const_data_ptr<float>(),
          own[1].const_data_ptr<float>(), own[0].size(0), own[0].stride(0)};
}

}  // namespace

std::optional<DType> dtype_of(at::ScalarType t) {
  if (t == at::kFloat) return DType::f32;
  if (t == at::kHalf) return DType::f16;
  if (t == at::kBFloat16) return DType::bf16;
  return std::nullopt;
}

void set_table(const std::string& format, int64_t nbits, const at::Tensor& values) {
  TORCH_CHECK(nbits >= 1 && nbits <= 8 && values.dim() == 1 && values.size(0) == (int64_t)1 << nbits &&
                  values.scalar_type() == at::kFloat && values.is_contiguous(),
              "a table of ", nbits, " bits is float32 [2^nbits], got ", values.sizes());
  auto made = std::make_unique<NamedTable>();
  const float* from = values.const_data_ptr<float>();
  made->values.assign(from, from + values.size(0));
  for (int digits = 0; digits < 4; ++digits)
    made->by_digits[(size_t)digits] = table_of(made->values.data(), values.size(0), digits);
  const std::lock_guard<std::mutex> hold(tables_lock);
  tables().try_emplace({format, nbits}, std::move(made));
}

bool has_table(c10::string_view format, int64_t nbits) { return find_table(format, nbits) != nullptr; }

Packed packed(const at::Tensor& qdata, const at::Tensor& scale, const std::optional<at::Tensor>& zero, const Settings& s,
              int digits) {
  const int64_t K = s.in_features, nbits = s.nbits, group_size = s.group_size;
  TORCH_CHECK(nbits >= 1 && nbits <= 8, "nbits must be 1 to 8, got ", nbits);
  TORCH_CHECK(s.axis == 0 || s.axis == 1, "axis must be 0 or 1, got ", s.axis);
  TORCH_CHECK(group_size >= 1 && K >= 1, "group_size and in_features must be positive, got ", group_size, ", ", K);
  TORCH_CHECK(qdata.dim() == 2 && qdata.scalar_type() == at::kByte && qdata.size(1) == (K + 7) / 8 * nbits,
              "qdata must be uint8 [N, ", (K + 7) / 8 * nbits, "], got ", qdata.scalar_type(), " ", qdata.sizes());
  const int64_t N = qdata.size(0), groups = ((s.axis == 1 ? K : N) + group_size - 1) / group_size;
  // A slice of rows keeps the groups of an axis-0 weight: there the number of groups is the scale's own.
  const bool own_groups = s.axis == 0 && scale.dim() == 2 && scale.size(0) >= 1;
  const int64_t rows = s.axis == 1 ? N : own_groups ? scale.size(0) : groups, columns = s.axis == 1 ? groups : K;
  Packed p{qdata.stride(1) == 1 || qdata.size(1) == 1 ? qdata : qdata.contiguous(), scale, {}, {}, {}};
  Weight& w = p.w;
  w.qdata = p.qdata.const_data_ptr<uint8_t>();
  w.row_stride = p.qdata.stride(0);
  w.N = N, w.K = K, w.groups = s.axis == 1 ? groups : rows, w.group_size = group_size;
  w.nbits = (int)nbits, w.axis = (int)s.axis;
  size_t used = 0;
  w.scale = values_of(p.scale, "scale", rows, columns, s.meta, used, p.own);
  if (s.format == "int") {
    TORCH_CHECK(zero.has_value(), "format 'int' has a zero_point besides its scale, got none");
    p.zero = *zero;
    w.zero = values_of(p.zero, "zero_point", rows, columns, s.meta, used, p.own + 2);
  } else if (s.format == "codebook") {
    const int64_t entries = (int64_t)1 << nbits;
    TORCH_CHECK(zero.has_value() && zero->dim() >= 1 && zero->dim() <= 2 && zero->size(-1) == entries &&
                    (zero->dim() == 1 || zero->size(0) == N || zero->size(0) == 1),
                "a codebook must be [", entries, "] or [", N, ", ", entries, "], got ", zero ? zero->sizes() : at::IntArrayRef());
    p.zero = zero->to(at::kFloat).contiguous();
    const bool by_row = p.zero.dim() == 2 && p.zero.size(0) > 1;
    w.table = table_of(p.zero.const_data_ptr<float>(), entries, by_row ? 0 : digits);
    if (by_row) w.table.stride = entries;
  } else {
    const NamedTable* table = find_table(s.format, nbits);
    TORCH_CHECK(table, "no table for format '", std::string(s.format), "' of ", nbits, " bits");
    w.table = table->by_digits[(size_t)digits];
  }
  return p;
}

}  // namespace hqqtensor
