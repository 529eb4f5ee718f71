// One product on the CPU: which kernel, its scratch memory, its threads.
#pragma once
#include <ATen/Parallel.h>

#include "kernels.h"

namespace hqqtensor {

// Scratch memory of a thread, kept for the next call: page faults cost more than the work of a small layer.
char* scratch(int64_t bytes, int slot);

// f(first, last) over [0, count), whole steps a thread; work below what waking another thread costs stays here.
template <class F>
void over(int64_t count, int64_t step, int64_t work, const F& f) {
  const int64_t pieces = (count + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, pieces * 65536 / std::max<int64_t>(work, 1));
  at::parallel_for(0, pieces, grain, [&](int64_t a, int64_t b) { f(a * step, std::min(b * step, count)); });
}

// Digits of the activations: 3 as exact as float32 sums, 2 finer than 16-bit floats, 1 for 8-bit activations. False,
// and nothing done, where `digits` is 1 and no integer kernel serves (the activations hold NaN, say).
bool run_linear(Problem p, int digits);

}  // namespace hqqtensor
