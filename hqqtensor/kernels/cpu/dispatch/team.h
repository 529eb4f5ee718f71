// Threads that stay together for many short pieces of work: to wake a thread costs microseconds, to meet it a fraction of one.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

#include "dispatch/threads.h"

namespace hqqtensor {

// Members must not throw: the others would wait for ever.
class Team {
 public:
  // f(team) on each of up to num_threads() threads, together. Within a parallel region the calling thread is alone.
  template <class F>
  static void run(const F& f) {
    const int64_t most = num_threads();
    if (most == 1) {
      Team alone;
      alone.size_ = 1;
      return f(alone);
    }
    Team team;
    // A thread that takes several places stands for all of them; how many there are is known to the first one alone.
    parallel_for(0, most, 1, [&](int64_t first, int64_t last) {
      if (first == 0) team.size_.store((most + last - 1) / last, std::memory_order_release);
      while (team.size_.load(std::memory_order_acquire) == 0) pause();
      f(team);
    });
  }

  int64_t size() const { return size_.load(std::memory_order_relaxed); }

  // Waits until all members have come. What each wrote before is then seen by all.
  void meet() {
    const int64_t size = this->size();
    if (size == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

  // f(first, last) for pieces of [0, count), shared out to the members; `next` starts at 0 and serves one call.
  template <class F>
  void share(std::atomic<int64_t>& next, int64_t count, int64_t step, const F& f) const {
    take_pieces(next, count, step, size(), f);
  }

 private:
  static constexpr int64_t kSpins = 20000;  // then the core goes to whoever holds up the others

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<int64_t> size_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace hqqtensor
