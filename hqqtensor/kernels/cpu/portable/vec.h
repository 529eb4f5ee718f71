// The vectors of plain C++: what generic/vec_api.h asks for.
#pragma once
#include "portable/codes.h"
#include "portable/digits.h"
#include "portable/floats.h"
