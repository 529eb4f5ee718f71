// The part of torch that the compiled operators use, without torch: tensors are sizes, strides and memory between pages that
// cannot be touched. fake_torch.cpp implements the C functions of torch's stable ABI with it.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace fake {

// Torch's dtypes by the numbers that this program gives them. complex64 stands for all that hqqtensor has no name for.
enum Code : int32_t {
  // clang-format off
  float32, float16, bfloat16, float64, uint8, int8, int16, int32, int64, uint16, uint32, uint64, boolean, complex64,
  // clang-format on
  kCodes
};
int64_t size_of(int32_t code);

struct Storage {
  void* data = nullptr;
  std::function<void()> release;
  ~Storage() {
    if (release) release();
  }
};

struct Tensor {
  int32_t code;
  int64_t dim;
  int64_t *sizes, *strides;  // in memory of their own, between pages that cannot be touched
  std::shared_ptr<Storage> shape, storage;

  int64_t numel() const;
  bool is_contiguous() const;
};

// Bytes beyond which the fake torch has no memory.
constexpr int64_t kMostBytes = (int64_t)1 << 24;

// A new tensor with memory for all numbers that it reaches; nullptr where that is more than kMostBytes.
Tensor* new_tensor(int32_t code, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);
void delete_tensor(Tensor*);
std::vector<int64_t> contiguous(const std::vector<int64_t>& sizes);

// Where new buffers lie (see Buffers in standalone.h), what they hold, and which request for a tensor is refused (from 1 on; 0:
// none).
void set_memory(bool touches_end, int refused);
double load_number(int32_t code, const void* from);
// One of the two, by the dtype: cut off to its bits.
void store_number(int32_t code, void* to, double real, int64_t whole);
// A handle more, or less, that is no tensor.
void count_handle(int64_t difference);
// Handles of tensors, lists and strings that nobody has freed yet.
int64_t live();

using Function = void (*)(uint64_t* stack, uint64_t inputs, uint64_t outputs);
struct Registered {
  Function run = nullptr;
  std::string schema;
};
// All operators by name, as the library registered them.
std::map<std::string, Registered>& operators();

}  // namespace fake
