// dispatch/threads.h on torch's pool of threads.
#include "dispatch/threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "torch/tensor.h"

namespace hqqtensor {
namespace {

// A loop as torch's callback sees it. Exceptions stay on this side of the border: torch may know another C++ library's.
struct Loop {
  void (*f)(const void* context, int64_t a, int64_t b);
  const void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the piece that failed first

  static void run(int64_t a, int64_t b, void* self) noexcept {
    auto& loop = *(Loop*)self;
    try {
      loop.f(loop.context, a, b);
    } catch (...) {
      if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
  }
};

}  // namespace

int64_t num_threads() {
  uint32_t count = 1;
  check_torch(torch_get_num_threads(&count), "asking for the number of threads");
  return count;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(const void* context, int64_t a, int64_t b),
                  const void* context) {
  if (begin >= end) return;
  if (end - begin <= std::max<int64_t>(grain, 1)) return f(context, begin, end);
  Loop loop{f, context, false, nullptr};
  check_torch(torch_parallel_for(begin, end, grain, &Loop::run, &loop), "running threads");
  if (loop.failed) std::rethrow_exception(loop.error);
}

}  // namespace hqqtensor
