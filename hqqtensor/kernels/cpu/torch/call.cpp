#include "torch/call.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "torch/standalone.h"

namespace hqqtensor {
namespace {

std::atomic<bool> automatic_choice{true}, choice_was_told{false};
thread_local std::string last_error;

// The operators that ask Python's registry are called kRegistry and the name of the public one.
constexpr const char *kPublic = "hqqtensor::", *kRegistry = "hqqtensor::registry_";

// An optional value is the address of a word that holds it, null where there is none.
const StableIValue* pointee(StableIValue word) { return (const StableIValue*)word; }

void free_tensor(StableIValue word) { aoti_torch_delete_tensor_object((AtenTensorHandle)word); }

void free_list(StableIValue word, bool of_tensors) {
  const auto list = (StableListHandle)word;
  size_t size = 0;
  torch_list_size(list, &size);
  StableIValue item;
  for (size_t i = 0; of_tensors && i < size; ++i)
    if (torch_list_get_item(list, i, &item) == AOTI_TORCH_SUCCESS) free_tensor(item);
  torch_delete_list(list);
}

void free_argument(char kind, StableIValue word) {
  if (kind == 't') free_tensor(word);
  if (kind == 'l' || kind == 'n') free_list(word, kind == 'l');
  if (kind == 's') torch_delete_string((StringHandle)word);
  if ((kind == 'T' || kind == 'L') && word != 0) {
    if (kind == 'T') free_tensor(*pointee(word));
    if (kind == 'L') free_list(*pointee(word), true);
    delete pointee(word);
  }
}

}  // namespace

Call::Call(StableIValue* stack, uint64_t arguments, const char* kinds, bool optional_result)
    : stack_(stack), kinds_(kinds), count_(std::strlen(kinds)), optional_result_(optional_result) {
  if (arguments == count_) return;
  // Arguments of unknown kinds cannot be freed.
  fail("hqqtensor's operators and its compiled kernels are of different versions: ", (int64_t)arguments,
       " arguments instead of ", (int64_t)count_, "; build the kernels again");
}

Call::~Call() {
  if (!forwarded_) {
    for (uint64_t i = 0; i < count_; ++i) free_argument(kinds_[i], stack_[i]);
    std::copy_n(results_, given_, stack_);
  }
}

StableIValue Call::next(char kind) {
  HQQ_CHECK(position_ < count_ && kinds_[position_] == kind, "argument ", (int64_t)position_,
            " of an operator is read as another kind");
  return stack_[position_++];
}

Tensor Call::tensor() { return {(AtenTensorHandle)next('t'), false}; }

Tensor Call::optional_tensor() {
  const StableIValue* word = pointee(next('T'));
  return word ? Tensor((AtenTensorHandle)*word, false) : Tensor();
}

std::vector<Tensor> Call::list(StableIValue word) {
  const auto handle = (StableListHandle)word;
  size_t size = 0;
  check_torch(torch_list_size(handle, &size), "reading a list of tensors");
  std::vector<Tensor> all;
  all.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    check_torch(torch_list_get_item(handle, i, &item), "reading a list of tensors");
    all.emplace_back((AtenTensorHandle)item, false);
  }
  return all;
}

std::vector<Tensor> Call::tensors() { return list(next('l')); }

std::vector<Tensor> Call::optional_tensors() {
  const StableIValue* word = pointee(next('L'));
  return word ? list(*word) : std::vector<Tensor>();
}

std::string_view Call::text() {
  const auto handle = (StringHandle)next('s');
  size_t length = 0;
  const char* data = nullptr;
  check_torch(torch_string_length(handle, &length), "reading a string");
  check_torch(torch_string_c_str(handle, &data), "reading a string");
  return {data, length};
}

int64_t Call::integer() { return (int64_t)next('i'); }

double Call::real() { return torch::stable::detail::to<double>(next('f')); }

std::vector<int64_t> Call::integers() {
  const auto handle = (StableListHandle)next('n');
  size_t size = 0;
  check_torch(torch_list_size(handle, &size), "reading a list of numbers");
  std::vector<int64_t> all(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    check_torch(torch_list_get_item(handle, i, &item), "reading a list of numbers");
    all[i] = (int64_t)item;
  }
  return all;
}

void Call::give(Tensor result) {
  const auto word = (StableIValue)result.release();
  results_[given_++] = optional_result_ ? (StableIValue) new StableIValue(word) : word;
}

void Call::give(std::string_view text) {
  StringHandle handle = nullptr;
  check_torch(torch_new_string_handle(text.data(), text.size(), &handle), "returning a string");
  results_[given_++] = (StableIValue)handle;
}

void Call::forward(const char* op) {
  if (is_standalone())
    fail(kPublic, std::string_view(op).substr(std::strlen(kRegistry)),
         ": the compiled kernels do not serve this dtype or format, and the Python package hqqtensor, which does, is not "
         "imported in this process (served: float32, bfloat16 and float16; formats \"int\" and \"codebook\")");
  forwarded_ = true;
  if (torch_call_dispatcher(op, "", stack_, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) return;
  // torch before 2.13 does not tell what the error was: the operators in Python remember.
  StableIValue text = 0;
  check_torch(torch_call_dispatcher("hqqtensor::_last_error", "", &text, TORCH_ABI_VERSION), op);
  const char* data = nullptr;
  check_torch(torch_string_c_str((StringHandle)text, &data), op);
  const std::string message = data;
  torch_delete_string((StringHandle)text);
  fail(message);
}

bool choice_is_automatic() { return automatic_choice.load(std::memory_order_relaxed); }

void set_choice_is_automatic(bool on) {
  automatic_choice = on;
  choice_was_told = true;
}

bool package_is_imported() { return choice_was_told; }

bool invoke(const Operator& op, Mode mode, StableIValue* stack, uint64_t arguments) noexcept {
  try {
    Call call(stack, arguments, op.kinds, mode == Mode::by_name);
    if (mode == Mode::automatic && op.registry && !choice_is_automatic())
      call.forward(op.registry);
    else if (!op.run(call))
      mode == Mode::by_name ? call.give_none() : call.forward(op.registry);
    return true;
  } catch (const std::bad_alloc&) {
    last_error = "not enough memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return false;
}

void raise_last_error() {
  aoti_torch_check(false, "hqqtensor", __FILE__, __LINE__, last_error.c_str());
  __builtin_unreachable();
}

}  // namespace hqqtensor
