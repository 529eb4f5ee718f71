// Memory for tensors that are large: in huge pages if the system gives them on request.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hqqtensor {

constexpr size_t kHugePage = (size_t)1 << 21;

// Bytes mapped for so many: whole pages, of 64 KiB on some processors.
inline size_t mapped(size_t bytes) { return (bytes + 65535) / 65536 * 65536; }

// Uninitialized, at a multiple of 64 bytes, of 2 MiB for that size and more; std::bad_alloc where there is none.
inline void* allocate(size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePage) {
    // A mapping of its own: what malloc hands out may have been used before in small pages, which stay small.
    const size_t size = mapped(bytes);
    void* const raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    const size_t before = (kHugePage - (size_t)raw % kHugePage) % kHugePage;
    char* const data = (char*)raw + before;
    if (before) munmap(raw, before);
    munmap(data + size, kHugePage - before);
    madvise(data, size, MADV_HUGEPAGE);
    return data;
  }
#endif
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
  return data;
}

// What `allocate(bytes)` gave.
inline void release(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePage) {
    munmap(data, mapped(bytes));
    return;
  }
#endif
  std::free(data);
}

}  // namespace hqqtensor
