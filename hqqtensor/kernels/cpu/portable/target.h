// The portable set: the compiler's default.
#pragma once
#define HQQTENSOR_VEC "portable/vec.h"
#include "generic/target.h"
