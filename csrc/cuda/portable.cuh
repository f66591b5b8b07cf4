// What the bodies of kernels need to be compiled for a GPU, and for the tests that emulate one on a CPU.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define GENFAST_ANYWHERE __host__ __device__
#define GENFAST_DEVICE __device__ __forceinline__
#define GENFAST_PRAGMA(text) _Pragma(#text)
#define GENFAST_UNROLL GENFAST_PRAGMA(unroll)
#define GENFAST_UNROLL_BY(count) GENFAST_PRAGMA(unroll count)
#else
#define GENFAST_ANYWHERE
#define GENFAST_DEVICE inline
#define GENFAST_UNROLL
#define GENFAST_UNROLL_BY(count)
struct alignas(16) float4 {
  float x, y, z, w;
};
#endif

namespace genfast {
namespace cuda {

// What is read-only for the whole run, such as weights: through the cache that other threads' writes do not reach.
template <class T>
GENFAST_DEVICE T constant_at(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

GENFAST_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

GENFAST_DEVICE float relu(float x) { return x < 0.f ? 0.f : x; }  // NaN stays

GENFAST_DEVICE float elu(float x) { return x > 0.f ? x : expm1f(x); }

GENFAST_DEVICE float logistic(float x) { return 1.f / (1.f + expf(-x)); }

}  // namespace cuda
}  // namespace genfast
