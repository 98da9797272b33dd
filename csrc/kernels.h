// What every kernels_<isa>.cpp includes before it selects its compiler target: the standard library must not be compiled
// for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"
