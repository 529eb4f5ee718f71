// The vectors of AVX-512 with VNNI: what generic/vec_api.h asks for.
#pragma once
#include "avx512/codes.h"
#include "avx512/digits.h"
#include "avx512/floats.h"
#include "avx512/pairs.h"
#include "avx512/spans.h"
#include "avx512/wide.h"
