// Errors of the operators: a message made of parts, thrown within this library and handed to torch at its border.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace hqqtensor {

struct Sizes {  // a shape, or strides
  const int64_t* data;
  int64_t count;

  Sizes(const int64_t* data, int64_t count) : data(data), count(count) {}
  Sizes(const std::vector<int64_t>& all) : data(all.data()), count((int64_t)all.size()) {}  // which must outlive this

  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + count; }
  int64_t operator[](int64_t i) const { return data[i < 0 ? i + count : i]; }
};

inline bool operator==(Sizes a, Sizes b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

inline void append(std::string& to, std::string_view text) { to += text; }
inline void append(std::string& to, int64_t number) { to += std::to_string(number); }
inline void append(std::string& to, Sizes sizes) {
  to += '[';
  for (int64_t i = 0; i < sizes.count; ++i) to += (i ? ", " : "") + std::to_string(sizes[i]);
  to += ']';
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

// The parts of the message are evaluated only if the condition does not hold.
#define HQQ_CHECK(condition, ...)                     \
  do {                                                \
    if (!(condition)) ::hqqtensor::fail(__VA_ARGS__); \
  } while (0)

}  // namespace hqqtensor
