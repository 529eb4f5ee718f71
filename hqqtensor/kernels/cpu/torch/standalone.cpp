#include "torch/standalone.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "torch/call.h"

namespace hqqtensor {
namespace {

std::atomic<bool> standalone{false};
std::mutex defining;

// The schemas of hqqtensor/ops/definitions.py and attention.py; tests/export/test_standalone.py compares them.
#define WEIGHT "Tensor qdata, Tensor scale, Tensor? zero_point"
#define SETTINGS "Tensor[]? meta, int nbits, str format, int group_size, int axis, int in_features"
constexpr const char* kOperators[][2] = {
    {"attention", "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scaling, float softcap, "
                  "Tensor[]? packed=None, "
                  "int[] packed_settings=[], Tensor? signs=None) -> Tensor"},
    {"dequantize", "(" WEIGHT ", " SETTINGS ", ScalarType dtype) -> Tensor"},
    {"dequantize_into", "(Tensor(a!) out, " WEIGHT ", " SETTINGS ") -> ()"},
    {"embedding", "(Tensor indices, " WEIGHT ", " SETTINGS ", ScalarType dtype) -> Tensor"},
};
constexpr const char* kProducts[][2] = {
    {"linear", "(Tensor x, " WEIGHT ", Tensor? bias, Tensor? act_pre_scale, " SETTINGS ", str activation) -> Tensor"},
    {"linear_many", "(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[]? zero_point, Tensor[]? bias, int nbits, str format, "
                    "int group_size, int axis, int in_features, str activation, Tensor[]? meta=None, "
                    "Tensor[]? act_pre_scale=None) -> Tensor"},
    {"batched_linear", "(Tensor x, " WEIGHT ", Tensor? act_pre_scale, " SETTINGS ", str activation) -> Tensor"},
    {"grouped_linear", "(Tensor x, Tensor offsets, " WEIGHT ", Tensor? act_pre_scale, " SETTINGS ", str activation) -> Tensor"},
};
#undef WEIGHT
#undef SETTINGS

void define_operators() {
  using torch::stable::detail::StableLibrary;
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::FRAGMENT, "hqqtensor", "", __FILE__, __LINE__);
  for (const auto& [name, schema] : kOperators) library->def((std::string(name) + schema).c_str());
  for (const auto& [name, schema] : kProducts) {
    library->def((std::string(name) + schema).c_str());
    library->def((std::string("_") + name + schema).c_str());  // what compiled graphs call
  }
  library.release();  // torch forgets the operators with it: all are defined, or none
}

}  // namespace

bool is_standalone() { return standalone.load(std::memory_order_relaxed); }

}  // namespace hqqtensor

int hqqtensor_define_operators() noexcept {
  using namespace hqqtensor;
  const std::lock_guard<std::mutex> hold(defining);
  if (is_standalone() || package_is_imported()) return 0;
  try {
    define_operators();
  } catch (...) {
    return 1;
  }
  standalone = true;
  return 0;
}
