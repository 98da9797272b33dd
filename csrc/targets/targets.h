// What every file of an instruction set includes before it selects its compiler target: the standard library must not
// be compiled for instructions that the processor may lack.
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

#include "../problem.h"

// For functions that the compiler may find too large to inline, and would then pass vectors through memory.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

// Everything between BEGIN_TARGET and END_TARGET is compiled for these instructions.
#define PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
