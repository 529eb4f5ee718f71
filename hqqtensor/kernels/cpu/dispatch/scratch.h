// Scratch memory of the calling thread. It is kept for the next call: page faults would cost more than the work of a small
// layer.
#pragma once
#include <cstdint>

namespace hqqtensor {

// What the memory is for. Each purpose has a buffer of its own, since a kernel runs while activations are in use.
enum class Scratch {
  activations,        // of a whole product: quantized, and dense
  kernel,             // of the kernel that runs
  group_activations,  // axis 0: quantized for some groups
  decoder_member,     // a member's own activations in a run of decoder layers
  decoder,            // what the members share
};

// At least `bytes` bytes, at a multiple of 64. They are overwritten by the thread's next call for the same purpose.
char* scratch(int64_t bytes, Scratch purpose);

}  // namespace hqqtensor
