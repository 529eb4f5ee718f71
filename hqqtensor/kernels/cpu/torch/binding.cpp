// Registers the operators with torch, through its stable ABI alone: this library has no symbol of Python and runs on every
// torch from TORCH_TARGET_VERSION on. The public operators are defined in hqqtensor/ops/definitions.py; those defined here
// belong to hqqtensor/kernels/cpu/__init__.py.
#include <torch/csrc/stable/library.h>

#include "torch/operators.h"

namespace hqqtensor {
namespace {

bool instruction_set(Call& c) {
  c.give(std::string_view(kernels().name));
  return true;
}

bool define_table(Call& c) {
  const std::string_view format = c.text();
  const int64_t nbits = c.integer();
  set_table(format, nbits, c.tensor());
  return true;
}

bool set_choice(Call& c) {
  set_choice_is_automatic(c.integer() != 0);
  return true;
}

// Letters: see Call. Settings of a packed weight: meta, nbits, format, group_size, axis, in_features.
constexpr Operator kLinear{"tttTTTLisiiis", linear, "hqqtensor::registry_linear"};
constexpr Operator kLinearMany{"tllLLisiiisLL", linear_many, "hqqtensor::registry_linear_many"};
constexpr Operator kBatchedLinear{"tttTTLisiiis", batched_linear, "hqqtensor::registry_batched_linear"};
constexpr Operator kGroupedLinear{"ttttTTLisiiis", grouped_linear, "hqqtensor::registry_grouped_linear"};
constexpr Operator kDequantize{"ttTLisiiii", dequantize, "hqqtensor::registry_dequantize"};
constexpr Operator kDequantizeInto{"tttTLisiii", dequantize_into, "hqqtensor::registry_dequantize_into"};
constexpr Operator kEmbedding{"tttTLisiiii", embedding, "hqqtensor::registry_embedding"};

constexpr Operator kColumnSpread{"ti", column_spread, nullptr};
constexpr Operator kAttention{"tttTTffLnT", attention, "hqqtensor::registry_attention"};

constexpr Operator kSolve{"tiiis", solve, nullptr};
constexpr Operator kAssign{"ttttiii", assign, nullptr};
constexpr Operator kSolveLevels{"ttttifiis", solve_levels, nullptr};
constexpr Operator kAssignLevels{"ttttttifiii", assign_levels, nullptr};
constexpr Operator kLloyd{"tttttif", lloyd, nullptr};
constexpr Operator kSolveWeighted{"tti", solve_weighted, nullptr};
constexpr Operator kFeedBack{"tttttti", feed_back, nullptr};
constexpr Operator kEmptyPacked{"n", empty_packed, nullptr};
constexpr Operator kPoolNew{"", pool_new, nullptr};
constexpr Operator kPoolDelete{"i", pool_delete, nullptr};
constexpr Operator kPoolEmpty{"ini", pool_empty, nullptr};
constexpr Operator kArenaNew{"i", arena_new, nullptr};
constexpr Operator kArenaTake{"ii", arena_take, nullptr};
constexpr Operator kArenaDelete{"i", arena_delete, nullptr};
constexpr Operator kDecoderNew{"iiiiiifffi", decoder_new, nullptr};
constexpr Operator kDecoderDelete{"i", decoder_delete, nullptr};
constexpr Operator kDecoderSetLayer{"iiii", decoder_set_layer, nullptr};
constexpr Operator kDecoderNorm{"iist", decoder_norm, nullptr};
constexpr Operator kDecoderLinear{"iisttTTTLisiiiii", decoder_linear, nullptr};
constexpr Operator kDecoderDense{"iistT", decoder_dense, nullptr};
constexpr Operator kDecoderRouter{"iitii", decoder_router, nullptr};
constexpr Operator kDecoderRun{"itllllTTnniiiLnT", decoder_run, nullptr};
constexpr Operator kInstructionSet{"", instruction_set, nullptr};
constexpr Operator kSetTable{"sit", define_table, nullptr};
constexpr Operator kSetChoice{"i", set_choice, nullptr};

}  // namespace
}  // namespace hqqtensor

using namespace hqqtensor;

STABLE_TORCH_LIBRARY_FRAGMENT(hqqtensor, m) {
  m.def("_column_spread(Tensor weight, int rounds) -> Tensor");
  m.def("_solve(Tensor weight, int nbits, int group_size, int axis, str solver) -> (Tensor, Tensor)");
  m.def("_assign(Tensor(a!) out, Tensor weight, Tensor inverse, Tensor zero_point, int nbits, int group_size, int axis) -> ()");
  m.def(
      "_solve_levels(Tensor weight, Tensor values, Tensor thresholds, Tensor codes, int mantissa, float least, int group_size, "
      "int axis, str solver) -> Tensor");
  m.def("_assign_levels(Tensor(a!) out, Tensor weight, Tensor inverse, Tensor values, Tensor thresholds, Tensor codes, "
        "int mantissa, float least, int nbits, int group_size, int axis) -> ()");
  m.def("_lloyd(Tensor groups, Tensor scales, Tensor values, Tensor thresholds, Tensor codes, int mantissa, float least) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("_solve_weighted(Tensor group, Tensor importance, int nbits) -> (Tensor, Tensor)");
  m.def("_feed_back(Tensor(a!) codes, Tensor(b!) errors, Tensor group, Tensor upper, Tensor scale, Tensor zero_point, "
        "int nbits) -> ()");
  m.def("_empty_packed(int[] sizes) -> Tensor");
  m.def("_pool_new() -> int");
  m.def("_pool_delete(int pool) -> ()");
  m.def("_pool_empty(int pool, int[] sizes, ScalarType dtype) -> Tensor");
  m.def(
      "_decoder_new(int layers, int hidden, int heads, int kv_heads, int head_dim, int intermediate, float eps, float scaling, "
      "float softcap, int gate) -> int");
  m.def("_decoder_delete(int decoder) -> ()");
  m.def("_decoder_set_layer(int decoder, int layer, int window, int rope) -> ()");
  m.def("_decoder_norm(int decoder, int layer, str role, Tensor weight) -> ()");
  m.def("_decoder_linear(int decoder, int layer, str role, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? bias, "
        "Tensor? act_pre_scale, Tensor[]? meta, int nbits, str format, int group_size, int axis, int in_features, int digits, "
        "int rotation) -> ()");
  m.def("_decoder_dense(int decoder, int layer, str role, Tensor weight, Tensor? bias) -> ()");
  m.def("_decoder_router(int decoder, int layer, Tensor weight, int chosen, bool normalized) -> ()");
  m.def("_decoder_run(int decoder, Tensor x, Tensor[] cos, Tensor[] sin, Tensor[] keys, Tensor[] values, Tensor? positions, "
        "Tensor? mask, "
        "int[] lengths, int[] firsts, int first_layer, int last_layer, bool verify, "
        "Tensor[]? packed, int[] packed_settings, Tensor? signs) -> Tensor?");
  m.def("_arena_new(int bytes) -> int");
  m.def("_arena_take(int arena, int bytes) -> Tensor");
  m.def("_arena_delete(int arena) -> ()");
  m.def("_instruction_set() -> str");
  m.def("_set_table(str format, int nbits, Tensor values) -> ()");
  m.def("_set_choice_is_automatic(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hqqtensor, CPU, m) {
  m.impl("linear", entry<kLinear, Mode::automatic>);
  m.impl("_linear", entry<kLinear, Mode::automatic>);
  m.impl("_cpu_linear", entry<kLinear, Mode::by_name>);
  m.impl("linear_many", entry<kLinearMany, Mode::automatic>);
  m.impl("_linear_many", entry<kLinearMany, Mode::automatic>);
  m.impl("batched_linear", entry<kBatchedLinear, Mode::automatic>);
  m.impl("_batched_linear", entry<kBatchedLinear, Mode::automatic>);
  m.impl("_cpu_batched_linear", entry<kBatchedLinear, Mode::by_name>);
  m.impl("grouped_linear", entry<kGroupedLinear, Mode::automatic>);
  m.impl("_grouped_linear", entry<kGroupedLinear, Mode::automatic>);
  m.impl("_cpu_grouped_linear", entry<kGroupedLinear, Mode::by_name>);
  m.impl("dequantize", entry<kDequantize, Mode::automatic>);
  m.impl("_cpu_dequantize", entry<kDequantize, Mode::by_name>);
  m.impl("dequantize_into", entry<kDequantizeInto, Mode::automatic>);
  m.impl("embedding", entry<kEmbedding, Mode::automatic>);
  m.impl("_cpu_embedding", entry<kEmbedding, Mode::by_name>);
  m.impl("_column_spread", entry<kColumnSpread, Mode::automatic>);
  m.impl("attention", entry<kAttention, Mode::automatic>);
  m.impl("_cpu_attention", entry<kAttention, Mode::by_name>);
  m.impl("_solve", entry<kSolve, Mode::automatic>);
  m.impl("_assign", entry<kAssign, Mode::automatic>);
  m.impl("_solve_levels", entry<kSolveLevels, Mode::automatic>);
  m.impl("_assign_levels", entry<kAssignLevels, Mode::automatic>);
  m.impl("_lloyd", entry<kLloyd, Mode::automatic>);
  m.impl("_solve_weighted", entry<kSolveWeighted, Mode::automatic>);
  m.impl("_feed_back", entry<kFeedBack, Mode::automatic>);
  m.impl("_set_table", entry<kSetTable, Mode::automatic>);
  m.impl("_decoder_norm", entry<kDecoderNorm, Mode::automatic>);
  m.impl("_decoder_linear", entry<kDecoderLinear, Mode::automatic>);
  m.impl("_decoder_dense", entry<kDecoderDense, Mode::automatic>);
  m.impl("_decoder_router", entry<kDecoderRouter, Mode::automatic>);
  m.impl("_decoder_run", entry<kDecoderRun, Mode::by_name>);
}

// Operators without tensors among their arguments.
STABLE_TORCH_LIBRARY_IMPL(hqqtensor, CompositeExplicitAutograd, m) {
  m.impl("_empty_packed", entry<kEmptyPacked, Mode::automatic>);
  m.impl("_pool_new", entry<kPoolNew, Mode::automatic>);
  m.impl("_pool_delete", entry<kPoolDelete, Mode::automatic>);
  m.impl("_pool_empty", entry<kPoolEmpty, Mode::automatic>);
  m.impl("_arena_new", entry<kArenaNew, Mode::automatic>);
  m.impl("_arena_take", entry<kArenaTake, Mode::automatic>);
  m.impl("_arena_delete", entry<kArenaDelete, Mode::automatic>);
  m.impl("_decoder_new", entry<kDecoderNew, Mode::automatic>);
  m.impl("_decoder_delete", entry<kDecoderDelete, Mode::automatic>);
  m.impl("_decoder_set_layer", entry<kDecoderSetLayer, Mode::automatic>);
  m.impl("_instruction_set", entry<kInstructionSet, Mode::automatic>);
  m.impl("_set_choice_is_automatic", entry<kSetChoice, Mode::automatic>);
}
