// Work shared out to threads. torch/threads.cpp implements the first two on torch's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace hqqtensor {

// Threads that parallel_for may use.
int64_t num_threads();

// f(context, a, b) for pieces [a, b) of [begin, end), in parallel. A piece has `grain` numbers at least; a range of no more
// than that, and any range within a parallel region, is one piece on the calling thread. Exceptions of f come out here.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(const void* context, int64_t a, int64_t b),
                  const void* context);

// The same with f(a, b).
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_for(begin, end, grain, [](const void* context, int64_t a, int64_t b) { (*(const F*)context)(a, b); }, &f);
}

// f(first, last) over [0, count), in one piece for each thread; pieces begin at multiples of `step`. work: multiply-adds in
// all. Below 65536 of them for a thread, waking it would cost more than it saves.
template <class F>
void parallel_over(int64_t count, int64_t step, int64_t work, const F& f) {
  const int64_t pieces = (count + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, pieces * 65536 / std::max<int64_t>(work, 1));
  parallel_for(0, pieces, grain, [&](int64_t a, int64_t b) { f(a * step, std::min(b * step, count)); });
}

// f(first, last) for pieces of [0, count) that begin at multiples of `step`, for one of `threads` threads that share `next`,
// which starts at 0. The first piece of a thread is long, because each piece begins with a wait for memory; later ones shrink.
template <class F>
void take_pieces(std::atomic<int64_t>& next, int64_t count, int64_t step, int64_t threads, const F& f) {
  const int64_t pieces = (count + step - 1) / step;
  for (bool again = false;; again = true) {
    int64_t first = next.load(), last;
    do {
      if (first >= pieces) return;
      const int64_t share = again ? (pieces - first) / (2 * threads) : pieces * 3 / (4 * threads);
      last = std::min(pieces, first + std::max<int64_t>(1, share));
    } while (!next.compare_exchange_weak(first, last));
    f(first * step, std::min(last * step, count));
  }
}

// As parallel_over, but threads come back for more pieces: one that gets less of its core, or of the memory's bandwidth, then
// does less.
template <class F>
void parallel_over_dynamic(int64_t count, int64_t step, int64_t work, const F& f) {
  const int64_t pieces = (count + step - 1) / step, worth = std::max<int64_t>(1, work / 65536);
  const int64_t threads = std::min({num_threads(), pieces, worth});
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) { take_pieces(next, count, step, threads, f); });
}

}  // namespace hqqtensor
