// Rows of a tile one by one, known when this is compiled: what is kept by row stays in registers. (In a plain loop that the
// compiler unrolls late, it goes through memory at every step.)
#pragma once

namespace {

template <class F>
inline __attribute__((always_inline)) void each_row(F f) {
  [&]<int... R>(std::integer_sequence<int, R...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, R>()), ...);
  }(std::make_integer_sequence<int, kRows>());
}

}  // namespace
