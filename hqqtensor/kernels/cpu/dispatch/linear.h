// One product on the CPU: which kernel, its scratch memory, its threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "dispatch/kernels.h"
#include "dispatch/threads.h"

namespace hqqtensor {

// Scratch memory of a thread, kept for the next call: page faults cost more than the work of a small layer.
char* scratch(int64_t bytes, int slot);

// f(first, last) over [0, count), whole steps a thread; work below what waking another thread costs stays here.
template <class F>
void over(int64_t count, int64_t step, int64_t work, const F& f) {
  const int64_t pieces = (count + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, pieces * 65536 / std::max<int64_t>(work, 1));
  parallel_for(0, pieces, grain, [&](int64_t a, int64_t b) { f(a * step, std::min(b * step, count)); });
}

// The same for pieces that threads come for, short ones towards the end: a thread that gets less of its core, or of the
// memory's bandwidth, does less. The first ones are long, since each begins with a wait for memory.
template <class F>
void in_turns(int64_t count, int64_t step, int64_t work, const F& f) {
  const int64_t pieces = (count + step - 1) / step, worth = std::max<int64_t>(1, work / 65536);
  const int64_t threads = std::min({num_threads(), pieces, worth});
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (bool again = false;; again = true) {
      int64_t first = next.load(), last;
      do {
        if (first >= pieces) return;
        const int64_t share = again ? (pieces - first) / (2 * threads) : pieces * 3 / (4 * threads);
        last = std::min(pieces, first + std::max<int64_t>(1, share));
      } while (!next.compare_exchange_weak(first, last));
      f(first * step, std::min(last * step, count));
    }
  });
}

// Digits of the activations: 3 as exact as float32 sums, 2 finer than 16-bit floats, 1 for 8-bit activations. False,
// and nothing done, where `digits` is 1 and no integer kernel serves (the activations hold NaN, say).
bool run_linear(Problem p, int digits);

// Products of the same activations with `count` weights packed alike, whose rows are shared out together: the activations
// are prepared once, and threads meet once.
bool run_linears(Problem* parts, int64_t count, int digits);

}  // namespace hqqtensor
