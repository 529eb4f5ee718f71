// coverage [OPTIONS OF LIBFUZZER] CORPUS: inputs chosen by the code of torch/ and dispatch/ that they reach. Each byte is a
// choice, as in main.cpp, so every damage of libFuzzer is another choice of arguments. See `make fuzz-arguments-coverage`.
#include "harness.h"

extern "C" int LLVMFuzzerRunDriver(int* count, char*** arguments, int (*run)(const uint8_t* data, size_t size));

namespace {

int run(const uint8_t* data, size_t size) {
  fake::run_input(data, size);
  return 0;
}

}  // namespace

int main(int count, char** arguments) { return LLVMFuzzerRunDriver(&count, &arguments, run); }
