// The begin and the end of code that is compiled for one instruction set, whatever the compiler's default is. gcc and clang
// understand both. Every header that has such code puts it between the two, after its includes: functions of the standard
// library must stay runnable on any processor.
//
// Before it includes anything else, a header or target.cpp of a set includes the set's target.h, which defines
//   HQQTENSOR_TARGET   the compiler's names of the features; not defined: the compiler's default
//   HQQTENSOR_VEC      the header with the vectors that generic code is written in (see vec_api.h)
// A header of generic/ that is opened by itself, as an editor does, gets the portable vectors.
#pragma once
#ifndef HQQTENSOR_VEC
#include "portable/target.h"
#endif

#define HQQTENSOR_PRAGMA_OF(...) _Pragma(#__VA_ARGS__)
#define HQQTENSOR_PRAGMA(...) HQQTENSOR_PRAGMA_OF(__VA_ARGS__)

#if !defined(HQQTENSOR_TARGET)
#define HQQTENSOR_BEGIN_TARGET
#define HQQTENSOR_END_TARGET
#elif defined(__clang__)
#pragma clang diagnostic ignored "-Wpragma-clang-attribute"  // vec_api.h adds nothing to a set that has everything
#define HQQTENSOR_BEGIN_TARGET \
  HQQTENSOR_PRAGMA(clang attribute push(__attribute__((target(HQQTENSOR_TARGET))), apply_to = function))
#define HQQTENSOR_END_TARGET HQQTENSOR_PRAGMA(clang attribute pop)
#else
#define HQQTENSOR_BEGIN_TARGET HQQTENSOR_PRAGMA(GCC push_options) HQQTENSOR_PRAGMA(GCC target(HQQTENSOR_TARGET))
#define HQQTENSOR_END_TARGET HQQTENSOR_PRAGMA(GCC pop_options)
#endif
