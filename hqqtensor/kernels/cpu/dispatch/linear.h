// One product on the CPU: chooses the kernel, its scratch memory and its threads.
#pragma once
#include <cstdint>

#include "dispatch/kernels.h"

namespace hqqtensor {

// y = x W^T + bias. digits: those of the quantized activations (QuantizedActivations::count); 3 are as exact as float32 sums, 2
// finer than 16-bit floats, 1 is for 8-bit activations. False, and y is not complete, if `digits` is 1 and no kernel serves
// (the activations hold NaN, say).
bool run_linear(Problem p, int digits);

// Products of the same activations with `count` weights that are packed alike. Activations are quantized once and the rows of
// all weights are shared out together, so that threads meet once.
bool run_linears(Problem* parts, int64_t count, int digits);

}  // namespace hqqtensor
