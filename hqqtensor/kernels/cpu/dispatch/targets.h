// The instruction sets that there are kernels for. To add one, write a folder and add its line here.
//
// Folder NAME has a target.cpp that defines
//   bool has_NAME();                  true if this processor and system can run it; compiled for any processor
//   const Kernels* kernels_NAME();    its table; called only where has_NAME() is true
#pragma once
#include "dispatch/kernels.h"

// The best first: the first one that the processor has is used. HQQTENSOR_CPU takes these names.
#define HQQTENSOR_TARGETS(TARGET) \
  TARGET(amx)                     \
  TARGET(avx512)                  \
  TARGET(avx2)                    \
  TARGET(portable)

namespace hqqtensor {

#define HQQTENSOR_DECLARE(name) \
  bool has_##name();            \
  const Kernels* kernels_##name();
HQQTENSOR_TARGETS(HQQTENSOR_DECLARE)
#undef HQQTENSOR_DECLARE

}  // namespace hqqtensor
