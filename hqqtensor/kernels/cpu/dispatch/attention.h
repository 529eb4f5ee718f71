// Attention of a few new tokens over keys and values that are read where they lie. Plain C structs go in and out; nothing here
// knows torch.
#pragma once
#include "dispatch/packed_cache.h"

namespace hqqtensor {

// Strides count numbers. Those of a mask are 0 where one mask serves all sequences.
struct AttentionCall {
  DType type;                                           // of all but the mask and the sinks
  int64_t batch, heads, kv_heads, tokens, length, dim;  // length: tokens that lie in keys and values; dim: a multiple of 16
  const void *q, *keys, *values;                        // [batch][heads][tokens][dim]; [batch][kv_heads][length][dim]
  int64_t q_strides[3];                                 // of a sequence, a head, a token
  int64_t key_strides[2], value_strides[2];             // of a sequence, a head; tokens lie one behind the other
  PackedCache packed;                                   // older tokens, of all sequences; first is 0
  const uint8_t* mask;                                  // [batch][tokens][packed tokens and length], 0: not seen; null: all are
  int64_t mask_strides[2];                              // of a sequence, a token
  const float* sinks;                                   // [heads]: see join_pieces; null where there are none
  float scaling, softcap;                               // of scores; softcap 0: none
  void* y;                                              // [batch][tokens][heads][dim]
};

void run_attention(const AttentionCall&);

}  // namespace hqqtensor
