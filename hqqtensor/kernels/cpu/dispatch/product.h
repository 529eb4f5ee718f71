// The parts of one product, for code that shares the work out itself: whether integers serve, how activations are laid out,
// and the columns of a piece.
#pragma once
#include <cstdint>

#include "dispatch/kernels.h"

namespace hqqtensor {

// True if HQQTENSOR_BATCH_INVARIANT=1 asks for results of a row that do not depend on how many rows come with it. It is read
// once, so that all of a product agrees.
bool batch_invariant();

// Which panels serve M tokens, and up to which M each kernel is the fastest. Layout::rows where the set has no panels.
PanelShape panel_shape(const Weight&, int64_t M, int digits);
// True if linear_rows is the kernel for M tokens.
bool linear_rows_serves(const Weight&, int64_t M, int digits);
// True if products of integers serve M tokens; linear_dense serves the others.
bool integers_serve(const Weight&, int64_t M, int digits);
// True if linear_dense with numbers rounded to bf16 is the fastest kernel, and the problem allows it.
bool rounding_serves(const Problem&, int digits);

// True if linear_dense with 8-bit activations and weights (kByteActivations) is the fastest kernel.
bool bytes_serve(const Weight&, int64_t M, int digits);

// Bytes that quantized_in takes, and as many behind as vectors run past the end; a multiple of 64.
int64_t quantized_bytes(const Weight&, int64_t M, int digits);
// Empty activations for the kernel that will multiply them.
QuantizedActivations quantized_in(const Weight&, int64_t M, int digits, char* memory);

// Columns [first, last) of y; axis 0: those of groups [first, last), x[g - first] for each.
void multiply(const Problem&, const QuantizedActivations* x, int64_t first, int64_t last);

// bf16 numbers that each activation is split into for linear_dense (DenseActivations::splits).
int splits_of(const Problem&, int digits);

}  // namespace hqqtensor
