#include "dispatch/scratch.h"

#include "dispatch/pages.h"

namespace hqqtensor {

char* scratch(int64_t bytes, Scratch purpose) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { give_back(); }
    void give_back() {
      if (data) release(data, (size_t)size);
      data = nullptr, size = 0;
    }
  };
  static thread_local Buffer buffers[5];
  Buffer& b = buffers[(int)purpose];
  if (b.size < bytes) {
    b.give_back();
    const int64_t size = (bytes + 4095) / 4096 * 4096;
    b.data = allocate((size_t)size);
    b.size = size;
  }
  return (char*)b.data;
}

}  // namespace hqqtensor
