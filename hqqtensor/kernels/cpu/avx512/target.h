// What the compiler must know about AVX-512 with VNNI, see generic/target.h. amx/target.h adds to it.
#pragma once
#ifndef HQQTENSOR_TARGET
#define HQQTENSOR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2,popcnt"
#endif
#define HQQTENSOR_VEC "avx512/vec.h"
#include "generic/target.h"

// gcc 12 finds uninitialized vectors in its own header, and in arrays of which the first few are used. The portable set, whose
// code is the same, still reports mistakes.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
