// A loop whose index is known when it is compiled.
#pragma once
#include <utility>

#include "generic/target.h"

HQQTENSOR_BEGIN_TARGET
namespace hqqtensor {
namespace {

// f(std::integral_constant<int, i>()) for i = 0 .. COUNT - 1. Arrays that f indexes with it stay in registers; in a plain loop
// that the compiler unrolls late they go through memory at every step.
template <int COUNT, class F>
inline __attribute__((always_inline)) void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, COUNT>());
}

}  // namespace
}  // namespace hqqtensor
HQQTENSOR_END_TARGET
