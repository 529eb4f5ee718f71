// What the compiler must know about AVX2, see generic/target.h.
#pragma once
#define HQQTENSOR_TARGET "avx2,fma,f16c,bmi2,popcnt"
#define HQQTENSOR_VEC "avx2/vec.h"
#include "generic/target.h"
