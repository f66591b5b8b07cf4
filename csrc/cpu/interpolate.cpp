// The backward of points between real and generated samples (WGAN-GP 1704.00028, algorithm 1):
// y_n = e_n real_n + (1 - e_n) fake_n, so e grad, (1 - e) grad, and for e the sum of grad (real - fake) over the sample.
//
// grad, real, fake (N, D) with D dense, e (N,). The forward is the library's lerp, which is one pass. Here grad is read once
// for whatever is wanted, real and fake only for the gradient of e, which needs no array of its own: 12 bytes an element in
// float for the first two. Bound by memory bandwidth. Sums in double, over chunks of kChunk, in an order of no thread's making.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 4096;

template <class T>
void backward(const InterpolateArgs& a) {
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  const int threads = a.n * a.d < kSerial ? 1 : a.threads;
  const Workspace<double> all_sums(a.grad_epsilon ? a.n * chunks : 0);
  double* sums = a.grad_epsilon ? all_sums.get() : nullptr;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * chunks; ++item) {
    const int64_t n = item / chunks, from = item % chunks * kChunk, size = a.d - from < kChunk ? a.d - from : kChunk;
    const T* grad = static_cast<const T*>(a.grad) + n * a.grad_stride + from;
    const T e = static_cast<const T*>(a.epsilon)[n], rest = T(1) - e;
    if (a.grad_real) {
      T* out = static_cast<T*>(a.grad_real) + n * a.d + from;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = e * grad[i];
    }
    if (a.grad_fake) {  // the chunk of grad is in the cache by now
      T* out = static_cast<T*>(a.grad_fake) + n * a.d + from;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = rest * grad[i];
    }
    if (sums) {
      const T* real = static_cast<const T*>(a.real) + n * a.real_stride + from;
      const T* fake = static_cast<const T*>(a.fake) + n * a.fake_stride + from;
      double part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = 0; i < size; ++i) part += double(grad[i]) * (double(real[i]) - double(fake[i]));
      sums[item] = part;
    }
  }
  if (!sums) return;
  for (int64_t n = 0; n < a.n; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += sums[n * chunks + k];
    static_cast<T*>(a.grad_epsilon)[n] = T(sum);
  }
}

}  // namespace

GENFAST_KERNEL(interpolate_backward, InterpolateArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
