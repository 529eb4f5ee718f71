#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace fake {

// Runs the calls that the bytes decide for. Ends the program where one of them does what it must not.
void run_input(const uint8_t* data, size_t size);

// The call that runs now, or ran last, to stderr.
void print_current();

struct Statistics {
  int64_t inputs = 0, taken = 0;  // taken: all of its calls were served
  int64_t calls = 0, served = 0;  // served: without an error
  std::map<std::string, int64_t> served_by_operator;
};
Statistics& statistics();

}  // namespace fake
