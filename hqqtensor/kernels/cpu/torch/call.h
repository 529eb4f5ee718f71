// One call of an operator as torch's stable ABI makes it: arguments and results are 64-bit words on a stack.
#pragma once
#include <string_view>
#include <utility>
#include <vector>

#include "torch/tensor.h"

namespace hqqtensor {

// Reads the arguments in the order of the schema, and keeps the results until the arguments are freed. All arguments belong to
// the callee: this object frees them, unless `forward` passes them on to another operator of the same schema.
class Call {
 public:
  // kinds: one letter for each argument of the schema.
  //   t Tensor    T Tensor?    l Tensor[]    L Tensor[]?    s str    i int, bool, ScalarType    f float    n int[]
  // optional_result: whether the schema returns Tensor? instead of Tensor.
  Call(StableIValue* stack, uint64_t arguments, const char* kinds, bool optional_result);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call();

  Tensor tensor();
  Tensor optional_tensor();  // none where the argument is None
  std::vector<Tensor> tensors();
  std::vector<Tensor> optional_tensors();  // empty where the argument is None
  std::string_view text();
  int64_t integer();
  double real();
  std::vector<int64_t> integers();

  void give(Tensor result);
  void give(int64_t result) { results_[given_++] = (StableIValue)result; }
  void give(std::string_view result);
  void give_none() { results_[given_++] = 0; }

  // Calls another operator with these arguments; its results are those of this call.
  void forward(const char* op);

 private:
  StableIValue next(char kind);
  std::vector<Tensor> list(StableIValue);

  StableIValue* stack_;
  const char* kinds_;
  uint64_t count_, position_ = 0;
  bool optional_result_, forwarded_ = false;
  int given_ = 0;
  StableIValue results_[4];  // no operator has more
};

// What an operator is called with and what runs it. `run` gives false where the kernels do not serve the arguments, before it
// has given a result.
struct Operator {
  const char* kinds;
  bool (*run)(Call&);
  const char* registry;  // the operator that asks Python's registry of backends; null where none does
};

// How an operator is called: as it chooses itself, or as the kernel of the backend "cpu", which gives None if it does not
// serve.
enum class Mode { automatic, by_name };

// False while the choice of backend is Python's: another one is the process's default, or one was chosen for a block of code.
bool choice_is_automatic();
void set_choice_is_automatic(bool);
// Whether the Python package is in this process: it says what the choice is when it is imported.
bool package_is_imported();

bool invoke(const Operator&, Mode, StableIValue* stack, uint64_t arguments) noexcept;
// Throws the last error of `invoke` through torch. Errors of this library's C++ never cross the border: torch may have been
// built with another C++ library.
[[noreturn]] void raise_last_error();

// The function to register. It has nothing to destroy, so torch's exception passes through it without running code of ours.
template <const Operator& op, Mode mode>
void entry(StableIValue* stack, uint64_t arguments, uint64_t) {
  if (!invoke(op, mode, stack, arguments)) raise_last_error();
}

}  // namespace hqqtensor
