// dispatch/threads.h on torch's pool of threads.
#include "dispatch/threads.h"

#include <ATen/Parallel.h>

namespace hqqtensor {

int64_t num_threads() { return at::get_num_threads(); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(const void* context, int64_t a, int64_t b),
                  const void* context) {
  at::parallel_for(begin, end, grain, [=](int64_t a, int64_t b) { f(context, a, b); });
}

}  // namespace hqqtensor
