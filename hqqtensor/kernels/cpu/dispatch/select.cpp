// Which instruction set to use, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dispatch/kernels.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hqqtensor {
namespace {

// Tiles of bytes and bfloat16 and permutations of bytes (CPUID 7); the system gives a process the registers when asked.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned tiles = 1u << 24 | 1u << 25 | 1u << 22, permutations = 1u << 1;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles || (c & permutations) == 0) return false;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

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
  if (name == "amx") return has("avx512") && has_amx();
#endif
  return false;
}

const Kernels* choose() {
  const char* forced = std::getenv("HQQTENSOR_CPU");
  const std::string name = forced ? forced : "";
  if (!name.empty() && name != "amx" && name != "avx512" && name != "avx2" && name != "portable")
    throw std::runtime_error("HQQTENSOR_CPU must be amx, avx512, avx2 or portable, got '" + name + "'");
  if (!name.empty() && !has(name)) throw std::runtime_error("HQQTENSOR_CPU=" + name + ", but this processor lacks it");
  if (name == "amx" || (name.empty() && has("amx"))) return kernels_amx();
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
