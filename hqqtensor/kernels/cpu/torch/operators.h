// The operators of hqqtensor for CPU tensors: arguments read and checked, kernels called. Their schemas and what they compute
// are in hqqtensor/ops/definitions.py.
#pragma once
#include "torch/call.h"
#include "torch/weights.h"

namespace hqqtensor {

// The tensors of a packed weight up to its zero point, and what follows the operator's other tensors.
void read_packed(Call&, PackedArguments&);
void read_settings(Call&, PackedArguments&);

// A vector of `size` numbers as contiguous float32; data is null where there is no tensor.
struct FloatVector {
  FloatVector(const Tensor&, const char* name, int64_t size);
  const float* data = nullptr;

 private:
  Tensor copy_;
  std::vector<float> floats_;
};

// The numbers of an integer tensor of any shape, row by row.
std::vector<int64_t> integers_of(const Tensor&);

// Each gives false where the kernels do not serve the format or the dtype.
bool linear(Call&);
bool linear_many(Call&);
bool batched_linear(Call&);
bool grouped_linear(Call&);
bool dequantize(Call&);
bool dequantize_into(Call&);
bool embedding(Call&);

// As those above, see hqqtensor/ops/attention.py.
bool attention(Call&);

// Quantizing a matrix: see hqqtensor/kernels/cpu/__init__.py for what each does.
bool column_spread(Call&);
bool solve(Call&);
bool assign(Call&);
bool solve_levels(Call&);
bool assign_levels(Call&);
bool lloyd(Call&);
bool solve_weighted(Call&);
bool feed_back(Call&);

// Decoder layers: see hqqtensor/generation/decoder.py. `decoder_run` gives false where it does not serve.
bool decoder_new(Call&);
bool decoder_delete(Call&);
bool decoder_set_layer(Call&);
bool decoder_norm(Call&);
bool decoder_linear(Call&);
bool decoder_dense(Call&);
bool decoder_router(Call&);
bool decoder_run(Call&);

// Memory.
bool empty_packed(Call&);
bool pool_new(Call&);
bool pool_delete(Call&);
bool pool_empty(Call&);
bool arena_new(Call&);
bool arena_take(Call&);
bool arena_delete(Call&);

}  // namespace hqqtensor
