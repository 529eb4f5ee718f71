// Chooses the instruction set, once.
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "dispatch/targets.h"

namespace hqqtensor {
namespace {

struct Target {
  const char* name;
  bool (*available)();
  const Kernels* (*kernels)();
};

#define HQQTENSOR_ENTRY(name) {#name, has_##name, kernels_##name},
constexpr Target kTargets[] = {HQQTENSOR_TARGETS(HQQTENSOR_ENTRY)};
#undef HQQTENSOR_ENTRY

// "a, b or c"
std::string all_names() {
  std::string names;
  for (size_t i = 0; i < std::size(kTargets); ++i)
    names += std::string(i == 0 ? "" : i + 1 < std::size(kTargets) ? ", " : " or ") + kTargets[i].name;
  return names;
}

const Kernels* choose() {
  const char* const forced = std::getenv("HQQTENSOR_CPU");
  const std::string name = forced ? forced : "";
  for (const Target& target : kTargets) {
    if (!name.empty() && name != target.name) continue;
    if (target.available()) return target.kernels();
    if (!name.empty()) throw std::runtime_error("HQQTENSOR_CPU=" + name + ", but this processor lacks it");
  }
  throw std::runtime_error("HQQTENSOR_CPU must be " + all_names() + ", got '" + name + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const table = choose();
  return *table;
}

}  // namespace hqqtensor
