#include "fake_torch.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "standalone.h"

namespace fake {
namespace {

bool memory_touches_end = true;
int until_refused = 0;
int64_t handles = 0;
std::string last_text;

AOTITorchError failure(const char* text) {
  last_text = text;
  return AOTI_TORCH_FAILURE;
}

std::shared_ptr<Storage> guarded(int64_t bytes, int64_t alignment) {
  auto buffers = std::make_shared<hqqtensor::Buffers>(memory_touches_end, memory_touches_end ? 0xA5 : 0xFF);
  auto storage = std::make_shared<Storage>();
  storage->data = buffers->take(bytes, alignment);
  std::memset(storage->data, memory_touches_end ? 0x11 : 0xEE, (size_t)bytes);
  storage->release = [buffers] {};
  return storage;
}

Tensor* with_shape(int32_t code, const int64_t* sizes, const int64_t* strides, int64_t dim) {
  auto* const t = new Tensor{code, dim, nullptr, nullptr, guarded(16 * dim, 8), nullptr};
  t->sizes = (int64_t*)t->shape->data, t->strides = t->sizes + dim;
  std::copy_n(sizes, dim, t->sizes);
  std::copy_n(strides, dim, t->strides);
  ++handles;
  return t;
}

Tensor* of(AtenTensorHandle handle) { return (Tensor*)handle; }

// One number of any dtype: exact as an integer or as a double.
struct Number {
  int64_t whole;
  double real;
};

template <class T>
Number as_number(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return {value == value && value > -9e18 && value < 9e18 ? (int64_t)value : 0, (double)value};
}

template <class T>
Number as_integer(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return {(int64_t)value, (double)value};
}

Number load(int32_t code, const void* from) {
  switch (code) {
    case float32: return as_number<float>(from);
    case float64: return as_number<double>(from);
    case float16: return as_number<_Float16>(from);
    case bfloat16: {
      uint16_t bits;
      std::memcpy(&bits, from, 2);
      const uint32_t wide = (uint32_t)bits << 16;
      return as_number<float>(&wide);
    }
    case int8: return as_integer<int8_t>(from);
    case int16: return as_integer<int16_t>(from);
    case int32: return as_integer<int32_t>(from);
    case int64: return as_integer<int64_t>(from);
    case uint16: return as_integer<uint16_t>(from);
    case uint32: return as_integer<uint32_t>(from);
    case uint64: return as_integer<uint64_t>(from);
    default: return as_integer<uint8_t>(from);
  }
}

template <class T>
void put(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

bool is_real(int32_t code) { return code <= float64; }

void store(int32_t code, void* to, Number n, bool real) {
  switch (code) {
    case float32: return put(to, (float)n.real);
    case float64: return put(to, n.real);
    case float16: return put(to, (_Float16)n.real);
    case bfloat16: {
      const auto value = (float)n.real;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return put(to, (uint16_t)(bits >> 16));
    }
    default: break;
  }
  const int64_t whole = real ? (int64_t)std::clamp(n.real, -9e18, 9e18) : n.whole;
  std::memcpy(to, &whole, (size_t)size_of(code));  // the lowest bytes
}

}  // namespace

int64_t size_of(int32_t code) {
  constexpr int64_t sizes[] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 2, 4, 8, 1, 8};
  return sizes[code];
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] == 0) return 0;
  for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != stride) return false;
    stride *= sizes[d];
  }
  return true;
}

std::vector<int64_t> contiguous(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return strides;
}

Tensor* new_tensor(int32_t code, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  __int128 last = 0;
  bool none = false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    none = none || sizes[d] == 0;
    last += (__int128)std::max<int64_t>(sizes[d] - 1, 0) * strides[d];
  }
  const __int128 bytes = none ? 0 : (last + 1) * size_of(code);
  if (bytes > kMostBytes) return nullptr;
  Tensor* const t = with_shape(code, sizes.data(), strides.data(), (int64_t)sizes.size());
  t->storage = none ? std::make_shared<Storage>() : guarded((int64_t)bytes, size_of(code));
  return t;
}

void delete_tensor(Tensor* t) {
  --handles;
  delete t;
}

void set_memory(bool touches_end, int refused) { memory_touches_end = touches_end, until_refused = refused; }
int64_t live() { return handles; }
void count_handle(int64_t difference) { handles += difference; }

double load_number(int32_t code, const void* from) { return load(code, from).real; }
void store_number(int32_t code, void* to, double real, int64_t whole) { store(code, to, {whole, real}, false); }

std::map<std::string, Registered>& operators() {
  static auto* const all = new std::map<std::string, Registered>;  // made before the operators are registered
  return *all;
}

}  // namespace fake

// ---- The C functions of torch ----

using namespace fake;

// NOLINTBEGIN: names and types are torch's
#define DTYPE(name, code) \
  int32_t aoti_torch_dtype_##name() { return code; }
DTYPE(float32, float32)
DTYPE(float16, float16)
DTYPE(bfloat16, bfloat16)
DTYPE(float64, float64)
DTYPE(uint8, uint8)
DTYPE(int8, int8)
DTYPE(int16, int16)
DTYPE(int32, int32)
DTYPE(int64, int64)
DTYPE(uint16, uint16)
DTYPE(uint32, uint32)
DTYPE(uint64, uint64)
DTYPE(bool, boolean)
#undef DTYPE

int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_device_type_meta() { return 2; }
int32_t aoti_torch_device_type_xpu() { return 3; }
int32_t aoti_torch_device_type_mps() { return 4; }
int32_t aoti_torch_layout_strided() { return 0; }
uint64_t aoti_torch_abi_version() { return 0; }
size_t aoti_torch_dtype_element_size(int32_t code) {
  if (code < 0 || code >= kCodes) throw std::runtime_error("torch has no such dtype");
  return (size_t)size_of(code);
}

void aoti_torch_check(bool condition, const char*, const char*, uint32_t, const char* text) {
  if (!condition) throw std::runtime_error(text);
}

extern "C" const char* torch_exception_get_what_without_backtrace() { return last_text.c_str(); }

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete_tensor(of(t));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle* out) {
  ++handles;
  *out = (AtenTensorHandle) new Tensor(*of(t));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* out) { return *out = of(t)->dim, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* out) { return *out = of(t)->numel(), AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** out) { return *out = of(t)->sizes, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** out) { return *out = of(t)->strides, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* out) { return *out = of(t)->code, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* out) { return *out = 0, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) { return *out = -1, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* out) {
  return *out = of(t)->is_contiguous(), AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** out) {
  return *out = of(t)->storage->data, AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** out) {
  return *out = of(t)->storage->data, AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t code, int32_t,
                                        int32_t, AtenTensorHandle* out) {
  if (until_refused && --until_refused == 0) return failure("there is no memory, as this input asks");
  Tensor* const t = new_tensor(code, {sizes, sizes + dim}, {strides, strides + dim});
  if (!t) return failure("there is no memory for so large a tensor");
  *out = (AtenTensorHandle)t;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t, int32_t code,
                               int32_t, int32_t, AtenTensorHandle* out, int32_t, const uint8_t*, int64_t,
                               void (*release)(void*, void*), void* context) {
  if (until_refused && --until_refused == 0) return failure("there is no memory, as this input asks");
  Tensor* const t = with_shape(code, sizes, strides, dim);
  t->storage = std::make_shared<Storage>();
  t->storage->data = data;
  t->storage->release = [=] { release(data, context); };
  *out = (AtenTensorHandle)t;
  return AOTI_TORCH_SUCCESS;
}

// `self` is contiguous: the library copies to tensors that it has just made.
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle source, int32_t) {
  Tensor &to = *of(self), &from = *of(source);
  const bool same = to.code == from.code;
  if (!same && (from.code == complex64 || to.code == complex64)) return failure("complex numbers are not copied to others");
  const int64_t count = to.numel(), in = size_of(from.code), out = size_of(to.code);
  std::vector<int64_t> at((size_t)from.dim);
  for (int64_t i = 0; i < count; ++i) {
    int64_t place = 0;
    for (int64_t d = 0; d < from.dim; ++d) place += at[(size_t)d] * from.strides[d];
    const char* const number = (const char*)from.storage->data + place * in;
    char* const target = (char*)to.storage->data + i * out;
    same ? (void)std::memcpy(target, number, (size_t)in) : store(to.code, target, load(from.code, number), is_real(from.code));
    for (int64_t d = from.dim - 1; d >= 0 && ++at[(size_t)d] == from.sizes[d]; --d) at[(size_t)d] = 0;
  }
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_list_size(StableListHandle list, size_t* out) {
  return *out = ((std::vector<uint64_t>*)list)->size(), AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* out) {
  return *out = ((std::vector<uint64_t>*)list)->at(i), AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  --handles;
  delete (std::vector<uint64_t>*)list;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_new_string_handle(const char* data, size_t size, StringHandle* out) {
  ++handles;
  *out = (StringHandle) new std::string(data, size);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** out) {
  return *out = ((std::string*)text)->c_str(), AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_string_length(StringHandle text, size_t* out) {
  return *out = ((std::string*)text)->size(), AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_string(StringHandle text) {
  --handles;
  delete (std::string*)text;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t) {
  return failure("there is no Python here");
}

AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle* out) {
  return *out = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle* out) {
  return *out = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* out) {
  return *out = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char* schema) {
  const std::string text = schema;
  operators()[text.substr(0, text.find('('))].schema = text;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, void (*run)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t) {
  operators()[name].run = run;
  return AOTI_TORCH_SUCCESS;
}
// NOLINTEND
