// Calibrated quantization of one group of columns, all rows of a matrix, for Python. See hqqtensor/kernels/cpu/__init__.py.
#include <algorithm>
#include <vector>

#include "dispatch/kernels.h"
#include "dispatch/threads.h"
#include "torch/operators.h"

namespace hqqtensor {
namespace {

// float32 [rows, columns] on the CPU, numbers of a row side by side.
struct Rows {
  const float* data;
  int64_t count, columns, stride;

  Rows(const Tensor& t, const char* name) {
    HQQ_CHECK(t.scalar() == Scalar::float32 && t.is_cpu() && t.dim() == 2 && t.size(0) >= 1 && t.size(1) >= 1 &&
                  (t.size(1) == 1 || t.stride(1) == 1),
              name, " must be float32 [rows, columns] on the CPU with neighbouring columns, got ", t, " on ", t.device());
    data = (const float*)t.data();
    count = t.size(0), columns = t.size(1), stride = t.stride(0);
  }
};

void check_nbits(int64_t nbits) { HQQ_CHECK(nbits >= 1 && nbits <= 8, "nbits must be 1 to 8, got ", nbits); }

void check_vector(const Tensor& t, const char* name, int64_t size) {
  HQQ_CHECK(t.scalar() == Scalar::float32 && t.is_cpu() && t.numel() == size && t.is_contiguous(), name,
            " must be contiguous float32 of ", size, " numbers, got ", t);
}

// run(block, row, real): blocks of rows as kernels take them, number j of row `row` + l at [j * lanes + l]; the last row is
// repeated where fewer than `lanes` are left.
template <class Run>
void over_blocks(const Rows& rows, const Run& run) {
  const int64_t lanes = kernels().lanes;
  parallel_for(0, (rows.count + lanes - 1) / lanes, 4, [&](int64_t first, int64_t last) {
    std::vector<float> block((size_t)(rows.columns * lanes));
    for (int64_t row = first * lanes; row < std::min(last * lanes, rows.count); row += lanes) {
      const int64_t real = std::min(lanes, rows.count - row);
      for (int64_t l = 0; l < lanes; ++l) {
        const float* in = rows.data + (row + std::min(l, real - 1)) * rows.stride;
        for (int64_t j = 0; j < rows.columns; ++j) block[(size_t)(j * lanes + l)] = in[j];
      }
      run(block.data(), row, real);
    }
  });
}

}  // namespace

bool solve_weighted(Call& c) {
  const Tensor group = c.tensor(), importance = c.tensor();
  const int64_t nbits = c.integer();
  check_nbits(nbits);
  const Rows rows(group, "group");
  check_vector(importance, "importance", rows.columns);
  const Kernels& k = kernels();
  Tensor scale = empty(std::vector<int64_t>{rows.count, 1}, Scalar::float32), zero = empty(scale.sizes(), Scalar::float32);
  auto *s = (float*)scale.mutable_data(), *z = (float*)zero.mutable_data();
  const auto* m = (const float*)importance.data();
  over_blocks(rows, [&](float* block, int64_t row, int64_t real) {
    std::vector<float> both((size_t)(2 * k.lanes));
    k.solve_weighted_block(block, m, rows.columns, (int)nbits, both.data(), both.data() + k.lanes);
    for (int64_t l = 0; l < real; ++l) {
      s[row + l] = 1 / both[(size_t)l];
      z[row + l] = both[(size_t)(k.lanes + l)];
    }
  });
  c.give(std::move(scale));
  c.give(std::move(zero));
  return true;
}

bool feed_back(Call& c) {
  const Tensor codes = c.tensor(), errors = c.tensor(), group = c.tensor(), upper = c.tensor(), scale = c.tensor(),
               zero = c.tensor();
  const int64_t nbits = c.integer();
  check_nbits(nbits);
  const Rows rows(group, "group"), factor(upper, "upper");
  HQQ_CHECK(factor.count == rows.columns && factor.columns == rows.columns, "upper must be [", rows.columns, ", ", rows.columns,
            "], got ", upper);
  check_vector(scale, "scale", rows.count);
  check_vector(zero, "zero_point", rows.count);
  check_vector(errors, "errors", rows.count * rows.columns);
  HQQ_CHECK(codes.scalar() == Scalar::uint8 && codes.is_cpu() && codes.dim() == 2 && codes.size(0) == rows.count &&
                codes.size(1) == rows.columns && (rows.columns == 1 || codes.stride(1) == 1),
            "codes must be uint8 of the shape of group on the CPU with neighbouring columns, got ", codes);
  const Kernels& k = kernels();
  const auto *s = (const float*)scale.data(), *z = (const float*)zero.data();
  auto* to = (uint8_t*)codes.mutable_data();
  auto* error = (float*)errors.mutable_data();
  const int64_t columns = rows.columns, to_stride = codes.stride(0), lanes = k.lanes;
  over_blocks(rows, [&](float* block, int64_t row, int64_t real) {
    std::vector<float> given((size_t)(2 * lanes)), found((size_t)(2 * columns * lanes));
    for (int64_t l = 0; l < lanes; ++l) {
      given[(size_t)l] = s[row + std::min(l, real - 1)];
      given[(size_t)(lanes + l)] = z[row + std::min(l, real - 1)];
    }
    k.feed_back_block(block, factor.data, factor.stride, columns, (int)nbits, given.data(), given.data() + lanes, found.data(),
                      found.data() + columns * lanes);
    for (int64_t l = 0; l < real; ++l)
      for (int64_t j = 0; j < columns; ++j) {
        to[(row + l) * to_stride + j] = (uint8_t)found[(size_t)(j * lanes + l)];
        error[(row + l) * columns + j] = found[(size_t)((columns + j) * lanes + l)];
      }
  });
  return true;
}

}  // namespace hqqtensor
