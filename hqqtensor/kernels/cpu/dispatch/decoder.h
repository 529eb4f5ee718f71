// Decoder layers of a transformer for a few new tokens: all layers in one parallel region. Plain C structs go in and out;
// nothing here knows torch.
#pragma once
#include <cstdint>
#include <vector>

#include "dispatch/packed_cache.h"

namespace hqqtensor {

// y = R(x * pre_scale) W^T + bias. R rotates runs of inputs (dispatch/hadamard.h).
struct Linear {
  Weight w;                // of a dense weight only N and K are told
  const float* bias;       // [N] or null
  const float* pre_scale;  // [K] or null
  int digits;              // of the quantized activations, see run_linear
  int64_t rotation;        // inputs of a run; 0: they are not rotated
  const void* dense;       // a weight that is not packed, [N][K] of dense_type, K a multiple of 16; null for packed ones
  DType dense_type;
};

// gate and up in one weight of twice the rows, or in two; down. Of an expert, or of the whole layer.
struct Mlp {
  std::vector<Linear> gate_up;
  Linear down;
};

// Chooses experts: softmax of the scores x W^T, of which the best `chosen` are kept.
struct Router {
  const float* weight;  // [experts][hidden]; null where there is one Mlp for all tokens
  int64_t experts, chosen;
  bool normalized;  // the weights of those chosen are divided by their sum
};

// One layer. x is what comes in, h = x + attention(norm(x)), and h + mlp(norm(h)) comes out. A norm is a vector of weights, or
// null where the family has none.
struct DecoderLayer {
  const float *input_norm, *attention_out_norm;  // [hidden]: before attention, and of what it gives
  const float *mlp_norm, *mlp_out_norm;          // [hidden]
  const float *q_norm, *k_norm;                  // [head_dim], of each head
  std::vector<Linear> qkv;                       // q, k and v in one weight, or in three
  Linear o;
  Router router;
  std::vector<Mlp> mlps;  // one, or as many as there are experts, all packed alike
  int64_t window;         // tokens that a token sees, itself among them; 0: all before it
  int64_t rope;           // which cosines and sines: an index into DecoderStep::ropes
};

struct Decoder {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float eps;      // of norms
  float scaling;  // of scores
  float softcap;  // of scores; 0: none
  GateFunction gate;
  std::vector<DecoderLayer> layers;
  const float* final_norm;  // [hidden], null: what the last layer gives is not normalized

  int64_t q_rows() const { return heads * head_dim; }
  int64_t qkv_rows() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Cosines and sines of the new tokens: x[i] and x[i + width / 2] are turned by the angle i, i < width / 2.
struct Rope {
  const float *cos, *sin;  // [batch][tokens][width]
  int64_t width;           // of a head: the rest of it stays as it is
};

// Keys and values of one sequence in one layer: [kv_heads][capacity][head_dim]. Those of the new tokens are written behind
// `length`.
struct LayerCache {
  char *keys, *values;
  int64_t head_stride;  // numbers
  int64_t length;       // tokens that are there already
  int64_t first;        // place in the sequence of the first of them
  PackedCache packed;   // tokens before these
};

struct DecoderStep {
  const void* x;  // [batch][tokens][hidden] of `type`
  void* y;        // the same shape
  DType type;     // of keys and values too
  int64_t batch, tokens;
  int64_t first_layer, last_layer;  // layers [first, last) run; the final norm only if the last one of all is among them
  std::vector<Rope> ropes;
  std::vector<LayerCache> caches;  // [layers that run][batch]
  const uint8_t* mask;  // [batch][mask_columns]: 0 for tokens of the sequence that no token sees; null: there are none
  int64_t mask_columns;

  // Of the i-th layer that runs and sequence b.
  const LayerCache& cache(size_t i, int64_t b) const { return caches[i * (size_t)batch + (size_t)b]; }
};

// False, and y and the new places of the caches hold nothing of use, if no kernel serves the activations: with 8-bit ones,
// where they hold NaN, say.
bool run_decoder(const Decoder&, const DecoderStep&);

}  // namespace hqqtensor
