#include "torch/tensor.h"

#include <algorithm>
#include <array>
#include <utility>

// Since torch 2.13, null before: the text of the last error that a C function reported on this thread.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace hqqtensor {
namespace {

struct Named {
  Scalar scalar;
  const char* name;
  int32_t code;
};

const std::array<Named, 13>& names() {
  static const std::array<Named, 13> all{{
      {Scalar::float32, "float32", aoti_torch_dtype_float32()},
      {Scalar::float16, "float16", aoti_torch_dtype_float16()},
      {Scalar::bfloat16, "bfloat16", aoti_torch_dtype_bfloat16()},
      {Scalar::float64, "float64", aoti_torch_dtype_float64()},
      {Scalar::uint8, "uint8", aoti_torch_dtype_uint8()},
      {Scalar::int8, "int8", aoti_torch_dtype_int8()},
      {Scalar::int16, "int16", aoti_torch_dtype_int16()},
      {Scalar::int32, "int32", aoti_torch_dtype_int32()},
      {Scalar::int64, "int64", aoti_torch_dtype_int64()},
      {Scalar::uint16, "uint16", aoti_torch_dtype_uint16()},
      {Scalar::uint32, "uint32", aoti_torch_dtype_uint32()},
      {Scalar::uint64, "uint64", aoti_torch_dtype_uint64()},
      {Scalar::boolean, "bool", aoti_torch_dtype_bool()},
  }};
  return all;
}

int32_t code_of(Scalar scalar) { return names()[(size_t)scalar].code; }

}  // namespace

void append(std::string& to, Scalar scalar) { to += scalar == Scalar::other ? "another dtype" : names()[(size_t)scalar].name; }

Scalar scalar_of(int32_t code) {
  for (const Named& n : names())
    if (n.code == code) return n.scalar;
  return Scalar::other;
}

bool is_floating(Scalar s) { return s <= Scalar::float64; }
bool is_integer(Scalar s) { return s >= Scalar::uint8 && s <= Scalar::uint64; }

std::optional<DType> dtype_of(Scalar s) {
  if (s == Scalar::float32) return DType::f32;
  if (s == Scalar::float16) return DType::f16;
  if (s == Scalar::bfloat16) return DType::bf16;
  return std::nullopt;
}

void check_torch(AOTITorchError code, const char* what) {
  if (code == AOTI_TORCH_SUCCESS) return;
  const char* text = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  if (text == nullptr || *text == 0) fail(what, " failed");
  fail(what, ": ", std::string_view(text));
}

Tensor::Tensor(AtenTensorHandle handle, bool owned) : handle_(handle), owned_(owned) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t code = 0;
  check_torch(aoti_torch_get_dim(handle, &dim), "reading the rank of a tensor");
  check_torch(aoti_torch_get_sizes(handle, &sizes), "reading the shape of a tensor");
  check_torch(aoti_torch_get_strides(handle, &strides), "reading the strides of a tensor");
  check_torch(aoti_torch_get_dtype(handle, &code), "reading the dtype of a tensor");
  sizes_ = {sizes, dim}, strides_ = {strides, dim}, scalar_ = scalar_of(code);
  item_size_ = (int32_t)aoti_torch_dtype_element_size(code);
}

Tensor::Tensor(Tensor&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)), sizes_(other.sizes_), strides_(other.strides_),
      item_size_(other.item_size_), scalar_(other.scalar_), owned_(other.owned_) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(owned_, other.owned_);
  sizes_ = other.sizes_, strides_ = other.strides_, item_size_ = other.item_size_, scalar_ = other.scalar_;
  return *this;
}

Tensor::~Tensor() {
  if (handle_ && owned_) aoti_torch_delete_tensor_object(handle_);
}

AtenTensorHandle Tensor::release() {
  if (!owned_) check_torch(aoti_torch_new_tensor_handle(handle_, &handle_), "a second handle of a tensor");
  return std::exchange(handle_, nullptr);
}

int64_t Tensor::numel() const {
  int64_t count = 0;
  check_torch(aoti_torch_get_numel(handle_, &count), "counting the numbers of a tensor");
  return count;
}

bool Tensor::is_contiguous() const {
  bool contiguous = false;
  check_torch(aoti_torch_is_contiguous(handle_, &contiguous), "reading the layout of a tensor");
  return contiguous;
}

bool Tensor::is_cpu() const {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t type = 0;
  check_torch(aoti_torch_get_device_type(handle_, &type), "reading the device of a tensor");
  return type == cpu;
}

std::string Tensor::device() const {
  int32_t type = 0, index = 0;
  check_torch(aoti_torch_get_device_type(handle_, &type), "reading the device of a tensor");
  check_torch(aoti_torch_get_device_index(handle_, &index), "reading the device of a tensor");
  const std::string name = type == aoti_torch_device_type_cpu()    ? "cpu"
                           : type == aoti_torch_device_type_cuda() ? "cuda"
                           : type == aoti_torch_device_type_meta() ? "meta"
                           : type == aoti_torch_device_type_xpu()  ? "xpu"
                           : type == aoti_torch_device_type_mps()  ? "mps"
                                                                   : "another device";
  return index < 0 || name == "cpu" || name == "meta" ? name : name + ":" + std::to_string(index);
}

const void* Tensor::data() const {
  const void* data = nullptr;
  check_torch(torch_get_const_data_ptr(handle_, &data), "reading the data of a tensor");
  return data;
}

void* Tensor::mutable_data() const {
  void* data = nullptr;
  check_torch(torch_get_mutable_data_ptr(handle_, &data), "reading the data of a tensor");
  return data;
}

void append(std::string& to, const Tensor& t) {
  if (!t) {
    to += "none";
    return;
  }
  append(to, t.scalar());
  to += ' ';
  append(to, t.sizes());
}

int64_t checked_product(Sizes sizes) {
  int64_t product = 1;
  bool none = false, overflow = false;
  for (const int64_t size : sizes) {
    none = none || size == 0;
    overflow = overflow || size < 0 || __builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product);
  }
  HQQ_CHECK(!overflow, "a tensor of shape ", sizes, " is too large");
  return none ? 0 : product;
}

Strides::Strides(Sizes sizes) {
  HQQ_CHECK(sizes.count <= kMostDimensions, "a tensor may have ", kMostDimensions, " dimensions at most, got ", sizes.count);
  checked_product(sizes);
  int64_t stride = 1;
  for (int64_t d = sizes.count - 1; d >= 0; --d) {
    data[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
}

Tensor empty(Sizes sizes, Scalar scalar) {
  const Strides strides(sizes);
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(sizes.count, sizes.data, strides.data, code_of(scalar), aoti_torch_device_type_cpu(), -1,
                                       &handle),
              "allocating a tensor");
  return {handle, true};
}

Tensor converted(const Tensor& t, Scalar scalar) {
  Tensor out = empty(t.sizes(), scalar);
  check_torch(aoti_torch_copy_(out.handle(), t.handle(), 0), "copying a tensor");
  return out;
}

Tensor plain_floats(const Tensor& t) {
  return t.scalar() == Scalar::float32 && t.is_contiguous() ? t.borrow() : converted(t, Scalar::float32);
}

Tensor from_blob(void* data, Sizes sizes, Scalar scalar, void (*release)(void*, void*), void* context) {
  const Strides strides(sizes);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError code =
      torch_from_blob(data, sizes.count, sizes.data, strides.data, 0, code_of(scalar), aoti_torch_device_type_cpu(), -1,
                      &handle, aoti_torch_layout_strided(), nullptr, 0, release, context);
  if (code != AOTI_TORCH_SUCCESS) release(data, context);
  check_torch(code, "making a tensor of memory");
  return {handle, true};
}

}  // namespace hqqtensor
