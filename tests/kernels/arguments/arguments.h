// Arguments of operators as values that can be changed before torch's form is made of them.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "fake_torch.h"

namespace fake {

// The decisions of an input, byte by byte. An input that has ended decides for the first choice each time.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int64_t below(int64_t count) {
    uint64_t number = 0;
    const int bytes = count <= 256 ? 1 : count <= 65536 ? 2 : 8;
    for (int i = 0; i < bytes; ++i) number = number << 8 | (at_ < size_ ? data_[at_++] : 0);
    return (int64_t)(number % (uint64_t)count);
  }
  int64_t from_to(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int64_t one_in) { return below(one_in) == one_in - 1; }  // no, where the input has ended
  template <class T>
  T choose(std::initializer_list<T> list) {
    return list.begin()[below((int64_t)list.size())];
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

struct TensorValue {
  int32_t code = float32;
  std::vector<int64_t> sizes, strides;  // strides: contiguous where there are none
  double low = -1, high = 1;            // of the numbers; all bytes where it is uint8 and high is 255
  std::vector<int64_t> numbers;         // these instead, as far as they go
};

struct Argument {
  bool none = false;
  int64_t integer = 0;
  double real = 0;
  std::string text;
  std::vector<TensorValue> tensors;  // of a list; the first one else
  std::vector<int64_t> integers;
};
// By their names in the schema.
using Arguments = std::map<std::string, Argument>;

// One call of an operator.
struct Planned {
  std::string op;
  Arguments arguments;
};

// Calls in order, most of which fit, with some of their arguments changed. -1 for a decoder, a pool or an arena: the one that
// the calls before have made.
std::vector<Planned> plan(Choices&);

// The parameters of a schema: name, and the letter of its kind (see torch/call.h).
struct Parameter {
  std::string name;
  char kind;
};
std::vector<Parameter> parameters_of(const std::string& schema);

}  // namespace fake
