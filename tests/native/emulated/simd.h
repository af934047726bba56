// AVX-512, VNNI and AMX on an AVX2 processor: SIMDe (https://github.com/simd-everywhere/simde, the PyPI package
// cmeel-simde), what it lacks, and tiles in software. For tests only: exact, and slow.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "amx.h"
#include "gaps.h"
