// What the compiler must know about AMX, see generic/target.h. Tiles need no feature, since they are used through assembly.
#pragma once
#define HQQTENSOR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2,popcnt"
#include "avx512/target.h"
