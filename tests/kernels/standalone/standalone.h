// What a program without torch gives the kernels: threads, scratch memory and an instruction set that it may change.
#pragma once
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch/kernels.h"

namespace hqqtensor {

// ---- Instruction sets ----

// The names of those that this processor has, the best first.
std::vector<std::string> instruction_sets();
// The set that kernels() gives from now on.
void use_instruction_set(const std::string& name);

// ---- Threads ----

enum class Threading {
  pieces,  // parallel_for runs its pieces one after the other: for a program that has one thread
  whole,   // the same with one piece, as a team of threads needs it
  pool,    // each thread that calls has threads of its own, as with OpenMP
};

// For calls by this thread.
void set_threading(Threading, int64_t threads);

// ---- Memory ----

// Buffers between pages that cannot be touched: an access beyond the page of an end stops the program. All are given back
// together.
class Buffers {
 public:
  // touches_end: buffers lie right before such a page, else right behind one. fill: what the rest of the page holds, so that
  // numbers that depend on it differ between two runs.
  Buffers(bool touches_end, uint8_t fill) : touches_end_(touches_end), fill_(fill) {}
  ~Buffers();
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // At a multiple of `alignment`; no more than that is left between an end and its page.
  void* take(int64_t bytes, int64_t alignment);
  template <class T>
  T* take(int64_t count) {
    return (T*)take(count * (int64_t)sizeof(T), (int64_t)sizeof(T));
  }

 private:
  struct Mapping {
    void* start;
    size_t size;
  };
  bool touches_end_;
  uint8_t fill_;
  std::vector<Mapping> mappings_;
};

// What scratch memory holds from now on, on all threads: zeros, or NaN. Whoever reads what nobody wrote then gets other
// numbers.
void fill_scratch(bool zeros);

// ---- Random numbers ----

struct Random {
  std::mt19937_64 engine;

  explicit Random(uint64_t seed) : engine(seed) {}
  int64_t below(int64_t count) { return (int64_t)(engine() % (uint64_t)count); }
  int64_t from_to(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int64_t one_in) { return below(one_in) == 0; }
  template <class T>
  T choose(std::initializer_list<T> list) {
    return list.begin()[below((int64_t)list.size())];
  }
  float real(float low, float high) { return low + (high - low) * (float)(engine() >> 40) * 0x1p-24f; }
};

// ---- Cases ----

// What a case computed, byte by byte.
using Result = std::vector<char>;

struct Case {
  const char* name;
  // The same numbers for the same seed, whatever the memory and the threads. std::runtime_error where they are wrong.
  Result (*run)(Random&, Buffers&);
};

extern const std::vector<Case> kCases;

}  // namespace hqqtensor
