// Defines a kernel of kernels.h by an expression over T, the type of its elements:
//   GENFAST_KERNEL(squeeze, SqueezeArgs, run<T>(a))   // void squeeze(const SqueezeArgs& a), for float and double
// Float64 serves gradcheck and references rather than training, so that AVX-512 has no kernels of its own for it and runs
// those of AVX2: they would be an eighth of the binary.
#pragma once

#include "kernels.h"
#include "vec.h"

#if defined(GENFAST_X86_LEVELS) && GENFAST_VECTOR_BYTES == 64
#define GENFAST_FLOAT64(name, ...) v3::name(a)
#else
#define GENFAST_FLOAT64(name, ...) \
  using T = double;                \
  __VA_ARGS__
#endif

#define GENFAST_KERNEL(name, Args, ...)  \
  void name(const Args& a) {             \
    if (a.is_double) {                   \
      GENFAST_FLOAT64(name, __VA_ARGS__); \
    } else {                             \
      using T = float;                   \
      __VA_ARGS__;                       \
    }                                    \
  }
