// The vectors of AVX2: what generic/vec_api.h asks for.
#pragma once
#include "avx2/codes.h"
#include "avx2/digits.h"
#include "avx2/floats.h"
