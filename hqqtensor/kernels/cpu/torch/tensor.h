// Tensors of torch, through the C functions of its stable ABI: a library that uses nothing else runs on every torch from
// TORCH_TARGET_VERSION on. torch::stable::Tensor wraps the same functions, but allocates for every handle and asks torch again
// for each size; a small product would spend longer on that than on its rows.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <optional>
#include <vector>

#include "dispatch/kernels.h"
#include "torch/error.h"

namespace hqqtensor {

enum class Scalar : uint8_t {
  // clang-format off
  float32, float16, bfloat16, float64, uint8, int8, int16, int32, int64, uint16, uint32, uint64, boolean, other
  // clang-format on
};
void append(std::string& to, Scalar);
Scalar scalar_of(int32_t code);  // of torch's code for a dtype
bool is_floating(Scalar);        // numbers that weights, scales and activations may have
bool is_integer(Scalar);
std::optional<DType> dtype_of(Scalar);  // of numbers that kernels read and write as they are

// Throws what torch reports for a C function that failed.
void check_torch(AOTITorchError code, const char* what);

class Tensor {
 public:
  Tensor() = default;  // none
  // `owned`: whether the handle is freed with this object. Otherwise it must outlive this object.
  Tensor(AtenTensorHandle, bool owned);
  Tensor(Tensor&&) noexcept;
  Tensor& operator=(Tensor&&) noexcept;
  ~Tensor();

  Tensor borrow() const { return handle_ ? Tensor(handle_, false) : Tensor(); }
  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release();  // the handle, which is the caller's to free from now on

  explicit operator bool() const { return handle_ != nullptr; }
  int64_t dim() const { return sizes_.count; }
  Sizes sizes() const { return sizes_; }
  Sizes strides() const { return strides_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int64_t numel() const;
  int64_t item_size() const { return item_size_; }  // bytes of a number
  Scalar scalar() const { return scalar_; }
  bool is_contiguous() const;
  bool is_cpu() const;
  std::string device() const;
  const void* data() const;
  void* mutable_data() const;

 private:
  AtenTensorHandle handle_ = nullptr;
  Sizes sizes_{nullptr, 0}, strides_{nullptr, 0};
  int32_t item_size_ = 0;
  Scalar scalar_ = Scalar::other;
  bool owned_ = false;
};

void append(std::string& to, const Tensor&);  // its dtype and shape, or "none"

// The product; throws where it is no int64.
int64_t checked_product(Sizes);

constexpr int64_t kMostDimensions = 64;
// The strides of a contiguous tensor.
struct Strides {
  explicit Strides(Sizes);
  int64_t data[kMostDimensions];
};

// Uninitialized, contiguous, on the CPU.
Tensor empty(Sizes, Scalar);
// A contiguous copy.
Tensor converted(const Tensor&, Scalar);
// Contiguous float32: the tensor itself, which must then outlive the result, or a copy.
Tensor plain_floats(const Tensor&);
// As `empty`, in memory that `release(data, context)` frees when no tensor uses it any more.
Tensor from_blob(void* data, Sizes, Scalar, void (*release)(void* data, void* context), void* context);

}  // namespace hqqtensor
