#include "torch/table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "torch/weights.h"

namespace hqqtensor {
namespace {

// Digits for the integer kernels: one where all values are multiples of the smallest, up to 31 of them; else `count` of
// 7 bits, which round values to 2^-14 or 2^-21 of their range. None where a value or the range is not finite.
void add_digits(Table& t, const float* v, int64_t entries, int count) {
  float low = v[0], high = v[0], smallest = INFINITY;
  for (int64_t i = 0; i < entries; ++i) {
    low = std::min(low, v[i]);
    high = std::max(high, v[i]);
    if (v[i] != 0) smallest = std::min(smallest, std::fabs(v[i]));
  }
  bool finite = std::isfinite(high - low);
  for (int64_t i = 0; i < entries; ++i) finite = finite && std::isfinite(v[i]);
  if (!finite) return;
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

// Named tables are added, never taken away: readers go through the list without a lock.
struct NamedTable {
  std::string format;
  int64_t nbits;
  std::vector<float> values;
  std::array<Table, 4> by_digits;  // of the activations
  const NamedTable* next;
};

std::atomic<const NamedTable*> first_table{nullptr};
std::mutex adding;

const NamedTable* named(std::string_view format, int64_t nbits) {
  const NamedTable* t = first_table.load(std::memory_order_acquire);
  while (t && (t->nbits != nbits || t->format != format)) t = t->next;
  return t;
}

}  // namespace

Table table_of(const float* values, int64_t entries, int digits) {
  Table t{};
  t.values = values;
  if (entries <= 16 && digits) add_digits(t, values, entries, digits == 3 ? 3 : 2);
  return t;
}

const Table* find_table(std::string_view format, int64_t nbits, int digits) {
  const NamedTable* t = named(format, nbits);
  return t ? &t->by_digits[(size_t)digits] : nullptr;
}

bool knows_format(std::string_view format, int64_t nbits) {
  return format == "int" || format == "codebook" || named(format, nbits) != nullptr;
}

void set_table(std::string_view format, int64_t nbits, const Tensor& values) {
  HQQ_CHECK(nbits >= 1 && nbits <= 8, "nbits must be 1 to 8, got ", nbits);
  HQQ_CHECK(values.dim() == 1 && values.size(0) == (int64_t)1 << nbits && values.scalar() == Scalar::float32 &&
                values.is_contiguous() && values.is_cpu(),
            "the table of format '", format, "' must be contiguous float32 [", (int64_t)1 << nbits, "], got ", values);
  const std::lock_guard<std::mutex> hold(adding);
  HQQ_CHECK(!named(format, nbits), "format '", format, "' has a table of ", nbits, " bits already");
  auto table = std::make_unique<NamedTable>();
  const auto* from = (const float*)values.data();
  table->format = format, table->nbits = nbits;
  table->values.assign(from, from + values.size(0));
  for (int digits = 0; digits < 4; ++digits)
    table->by_digits[(size_t)digits] = table_of(table->values.data(), values.size(0), digits);
  table->next = first_table.load(std::memory_order_relaxed);
  first_table.store(table.release(), std::memory_order_release);
}

}  // namespace hqqtensor
