// From the tensors of an operator to packed weights that kernels read, with every check that these rely on; and the tables of
// the named formats. There is no other way from tensors to a Weight.
#pragma once
#include <string_view>
#include <vector>

#include "dispatch/kernels.h"
#include "torch/tensor.h"

namespace hqqtensor {

// What every operator takes of a packed weight, unchecked; see hqqtensor/ops/packed.py.
struct PackedArguments {
  Tensor qdata, scale, zero;  // zero: none where the format has no zero point
  std::vector<Tensor> meta;
  int64_t nbits;
  std::string_view format;
  int64_t group_size, axis, in_features;
};

// The values, float32 [2^nbits], that the codes of a format stand for. A format that has them already is refused.
void set_table(std::string_view format, int64_t nbits, const Tensor& values);
// True if there are kernels for the format: integers, codebooks, and tables that `set_table` was told.
bool knows_format(std::string_view format, int64_t nbits);

// The matrices [rows, columns] of a tensor [..., rows, columns], copied if they do not lie so that numbers of a row are
// neighbours and all matrices have one distance.
struct Matrices {
  Tensor copy;  // none where the tensor itself is read
  const char* data = nullptr;
  int64_t row_stride = 0, matrix_stride = 0;  // in bytes
};
Matrices matrices_of(const Tensor&);

// One packed weight [N, K] or a stack of them [..., N, K]. Holds the memory of tensors that had to be copied; the others must
// outlive it.
class PackedWeights {
 public:
  // rank: what qdata must have, or 0 for any from 2 on. digits: those of the activations (see run_linear), which say how many
  // digits tables get; 0 for kernels that multiply no integers.
  PackedWeights(const PackedArguments&, int rank, int digits);

  int64_t count() const { return count_; }  // of matrices: the product of the leading dimensions
  int64_t N() const { return first_.N; }
  int64_t K() const { return first_.K; }
  Weight at(int64_t i) const;  // i: 0 to count - 1

 private:
  struct Part {  // scales or zero points
    Matrices values, meta_scale, meta_zero;
  };

  void read_settings(const PackedArguments&);
  void read_qdata(const PackedArguments&, int rank);
  Values read_values(const PackedArguments&, const Tensor&, const char* name, int64_t rows, int64_t columns, Part&);
  Matrices read_meta(const PackedArguments&, int64_t columns, int64_t* rows);
  void read_table(const PackedArguments&);
  void read_codebook(const PackedArguments&);
  bool has_shape(const Tensor&, int64_t rows, int64_t columns) const;  // beside qdata
  std::vector<int64_t> expected(int64_t rows, int64_t columns) const;  // that shape

  Weight first_{};
  std::vector<int64_t> leading_;  // dimensions of the stack
  int64_t count_ = 1;
  int digits_;
  size_t used_ = 0;  // tensors of meta that were read
  Matrices qdata_, codebook_;
  Part scale_, zero_;
};

}  // namespace hqqtensor
