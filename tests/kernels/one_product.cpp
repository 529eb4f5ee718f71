// One product of each kind through the chosen instruction set, against double precision; prints the set's name. Compiled by
// test_instruction_sets.py together with dispatch/ and one set, without torch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dispatch/linear.h"
#include "dispatch/targets.h"
#include "dispatch/threads.h"

namespace hqqtensor {

// All on the calling thread.
int64_t num_threads() { return 1; }
void parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(const void*, int64_t, int64_t), const void* context) {
  if (begin < end) f(context, begin, end);
}

// The sets that are not linked in.
#define HQQTENSOR_ABSENT(name)        \
  bool has_##name() { return false; } \
  const Kernels* kernels_##name() { return nullptr; }
ABSENT_TARGETS(HQQTENSOR_ABSENT)

}  // namespace hqqtensor

using namespace hqqtensor;

namespace {

constexpr int64_t N = 21, K = 328, kGroupSize = 64, kGroups = 6;  // a short last block and a short last group

// The largest error of y = x W^T with M tokens, as a share of the sum of the magnitudes of what is added.
double error(int64_t M) {
  const int64_t row_bytes = (K + 7) / 8 * 4;
  std::vector<uint8_t> codes(N * K), packed(N * row_bytes);
  std::vector<float> scale(N * kGroups), zero(N * kGroups), x(M * K), y(M * N);
  for (int64_t i = 0; i < N * K; ++i) codes[i] = (uint8_t)((i * 7 + i / 13) % 16);
  for (int64_t i = 0; i < N * kGroups; ++i) scale[i] = 0.01f * (float)(i % 9 + 1), zero[i] = (float)(i % 16);
  for (int64_t i = 0; i < M * K; ++i) x[i] = std::sin((float)i * 0.37f);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; k += 128) {  // a block of B codes: byte i has codes i and i + B / 2
      const int64_t half = (K - k < 128 ? K - k : 128) / 2;
      for (int64_t i = 0; i < half; ++i)
        packed[n * row_bytes + k / 2 + i] = (uint8_t)(codes[n * K + k + i] | codes[n * K + k + half + i] << 4);
    }
  const auto values = [](const std::vector<float>& v) {
    return Values{v.data(), DType::f32, kGroups, kGroups * 4, nullptr, nullptr, 1, 0};
  };
  Problem p{};
  p.w = {packed.data(), row_bytes, values(scale), values(zero), {}, N, K, kGroups, kGroupSize, 4, 1};
  p.x = x.data(), p.x_stride = K, p.M = M, p.x_type = DType::f32;
  p.y = y.data(), p.y_stride = N;
  if (!run_linear(p, 3)) return INFINITY;
  double worst = 0;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t g = n * kGroups + k / kGroupSize;
        const double one = ((double)codes[n * K + k] - zero[g]) * scale[g] * x[m * K + k];
        sum += one, size += std::fabs(one);
      }
      worst = std::fmax(worst, std::fabs(y[m * N + n] - sum) / size);
    }
  return worst;
}

}  // namespace

int main() {
  for (const int64_t M : {1, 3, 40}) {  // linear_rows twice, then linear_panel or linear_dense
    const double worst = error(M);
    if (!(worst < 1e-5)) {
      std::printf("%lld tokens: error %g\n", (long long)M, worst);
      return EXIT_FAILURE;
    }
  }
  std::printf("%s\n", kernels().name);
}
