// Which instruction set to use, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hqqtensor {
namespace {

bool has(const std::string& name) {
  if (name == "portable") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  if (name == "avx2") return avx2;
  if (name == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

const Kernels* choose() {
  const char* forced = std::getenv("HQQTENSOR_CPU");
  const std::string name = forced ? forced : "";
  if (!name.empty() && name != "avx512" && name != "avx2" && name != "portable")
    throw std::runtime_error("HQQTENSOR_CPU must be avx512, avx2 or portable, got '" + name + "'");
  if (!name.empty() && !has(name)) throw std::runtime_error("HQQTENSOR_CPU=" + name + ", but this processor lacks it");
  if (name == "avx512" || (name.empty() && has("avx512"))) return kernels_avx512();
  if (name == "avx2" || (name.empty() && has("avx2"))) return kernels_avx2();
  return kernels_portable();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const table = choose();
  return *table;
}

}  // namespace hqqtensor
