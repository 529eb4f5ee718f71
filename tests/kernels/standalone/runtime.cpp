// Threads, scratch memory and the choice of an instruction set, in the place of torch's pool, scratch.cpp and select.cpp.
#include <sys/mman.h>
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "dispatch/scratch.h"
#include "dispatch/targets.h"
#include "dispatch/threads.h"
#include "standalone.h"

namespace hqqtensor {

#if defined(ABSENT_TARGETS)  // the sets that are not linked in
#define HQQTENSOR_ABSENT(name)        \
  bool has_##name() { return false; } \
  const Kernels* kernels_##name() { return nullptr; }
ABSENT_TARGETS(HQQTENSOR_ABSENT)
#endif

namespace {

const Kernels* in_use = nullptr;
std::atomic<bool> scratch_has_zeros{true};

// Threads that wait for work of the one that made them.
class Pool {
 public:
  explicit Pool(int64_t others) {
    for (int64_t i = 0; i < others; ++i) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  int64_t others() const { return (int64_t)threads_.size(); }

  // f(i) for i = 0 .. others(), the last one on the calling thread.
  void run(const std::function<void(int64_t)>& f) {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      work_ = &f, running_ = others(), ++round_;
    }
    wake_.notify_all();
    f(others());
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [this] { return running_ == 0; });
  }

 private:
  void serve(int64_t i) {
    int64_t round = 0;
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      wake_.wait(hold, [&] { return stop_ || round_ != round; });
      if (stop_) return;
      round = round_;
      const auto* const work = work_;
      hold.unlock();
      (*work)(i);
      hold.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t running_ = 0, round_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

thread_local Threading threading = Threading::pieces;
thread_local int64_t thread_count = 1;
thread_local std::unique_ptr<Pool> pool;
thread_local bool within = false;  // a parallel region

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#define HQQTENSOR_NAME(name) \
  if (has_##name()) names.push_back(#name);
  HQQTENSOR_TARGETS(HQQTENSOR_NAME)
#undef HQQTENSOR_NAME
  return names;
}

void use_instruction_set(const std::string& name) {
#define HQQTENSOR_USE(set) \
  if (name == #set) in_use = kernels_##set();
  HQQTENSOR_TARGETS(HQQTENSOR_USE)
#undef HQQTENSOR_USE
}

const Kernels& kernels() { return *in_use; }

void set_threading(Threading kind, int64_t threads) { threading = kind, thread_count = threads; }

int64_t num_threads() { return within ? 1 : thread_count; }

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(const void* context, int64_t a, int64_t b),
                  const void* context) {
  if (begin >= end) return;
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t count = std::min(most, thread_count);
  if (within || count <= 1 || threading == Threading::whole) return f(context, begin, end);
  const int64_t share = (end - begin + count - 1) / count;
  const std::function<void(int64_t)> piece = [&](int64_t i) {
    const bool before = within;
    within = true;
    const int64_t first = begin + i * share, last = std::min(end, first + share);
    if (first < last) f(context, first, last);
    within = before;
  };
  if (threading == Threading::pieces) {
    for (int64_t i = 0; i < count; ++i) piece(i);
    return;
  }
  if (!pool || pool->others() != count - 1) pool = std::make_unique<Pool>(count - 1);
  pool->run(piece);
}

void fill_scratch(bool zeros) { scratch_has_zeros = zeros; }

// Anew at each call, between pages that cannot be touched.
char* scratch(int64_t bytes, Scratch purpose) {
  static thread_local std::unique_ptr<Buffers> buffers[5];
  auto& memory = buffers[(int)purpose];
  memory = std::make_unique<Buffers>(true, 0xA5);
  void* const out = memory->take(bytes, 64);
  std::memset(out, scratch_has_zeros ? 0 : 0xFF, (size_t)bytes);
#if defined(VALGRIND_MAKE_MEM_UNDEFINED)
  (void)VALGRIND_MAKE_MEM_UNDEFINED(out, bytes);
#endif
  return (char*)out;
}

// ---- Memory ----

void* Buffers::take(int64_t bytes, int64_t alignment) {
  constexpr int64_t kPage = 4096;
  const int64_t inside = std::max<int64_t>(1, (bytes + kPage - 1) / kPage) * kPage;
  const auto size = (size_t)(inside + 2 * kPage);
  auto* const start = (char*)mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  mappings_.push_back({start, size});
  char* const first = start + kPage;
  if (mprotect(first, (size_t)inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  char* const at = touches_end_ ? first + inside - rounded : first;
  if (at > first) std::memset(first, fill_, (size_t)(at - first));
  if (at + bytes < first + inside) std::memset(at + bytes, fill_, (size_t)(first + inside - at - bytes));
  return at;
}

Buffers::~Buffers() {
  for (const Mapping& m : mappings_) munmap(m.start, m.size);
}

}  // namespace hqqtensor
