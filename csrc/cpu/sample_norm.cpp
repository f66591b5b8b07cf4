// The Euclidean norm of each sample (of a critic's gradient in WGAN-GP 1704.00028, equation 3): |x_n| = sqrt sum_i x_ni^2.
//
// x (N, D) with D dense, out (N,). One pass: the forward reads x once (4 bytes an element in float), the backward, which
// scales each sample by g / |x| or 2 g, reads it and writes its gradient (8). Bound by memory bandwidth. Squares are added
// in double, so float neither overflows nor underflows; double is summed again, scaled, where its squares would. Sums over
// chunks of kChunk, added in their own order, whatever the threads.
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 8192;
constexpr double kSmall = 1e-280, kLarge = 1e300;  // beyond these a sum of squares may have lost some of them

typedef float HalfWidth __attribute__((vector_size(GENFAST_VECTOR_BYTES / 2)));  // as many floats as a vector has doubles

GENFAST_INLINE Vec<double> load_double(const float* p) {
  HalfWidth v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}

GENFAST_INLINE Vec<double> load_double(const double* p) { return load(p); }

template <class T>
double sum_of_squares(const T* x, int64_t size) {
  constexpr int n = lanes<double>();
  Vec<double> part[4] = {};
  int64_t i = 0;
  for (; i + 4 * n <= size; i += 4 * n) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec<double> v = load_double(x + i + k * n);
      part[k] += v * v;
    }
  }
  double rest = 0;
  for (; i < size; ++i) rest += double(x[i]) * double(x[i]);
  return sum<double>((part[0] + part[1]) + (part[2] + part[3])) + rest;
}

// By the largest magnitude, for a sum that would overflow or vanish.
template <class T>
double scaled_norm(const T* x, int64_t size) {
  double largest = 0, sum = 0;
  for (int64_t i = 0; i < size; ++i) largest = fmax(largest, fabs(double(x[i])));
  if (largest == 0 || isinf(largest)) return largest;
  for (int64_t i = 0; i < size; ++i) sum += (double(x[i]) / largest) * (double(x[i]) / largest);
  return largest * sqrt(sum);
}

template <class T>
void forward(const SampleNormArgs& a) {
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  const int threads = a.n * a.d < kSerial ? 1 : a.threads;
  const T* x = static_cast<const T*>(a.x);
  const Workspace<double> all_sums(a.n * chunks);
  double* sums = all_sums.get();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * chunks; ++item) {
    const int64_t n = item / chunks, from = item % chunks * kChunk;
    sums[item] = sum_of_squares(x + n * a.x_stride + from, a.d - from < kChunk ? a.d - from : kChunk);
  }
  for (int64_t n = 0; n < a.n; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += sums[n * chunks + k];
    double norm = a.squared ? sum : sqrt(sum);
    if (sizeof(T) == 8 && !a.squared && (sum < kSmall || sum > kLarge)) norm = scaled_norm(x + n * a.x_stride, a.d);
    static_cast<T*>(a.out)[n] = T(norm);
  }
}

template <class T>
void backward(const SampleNormArgs& a) {
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  const int threads = a.n * a.d < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * chunks; ++item) {
    const int64_t n = item / chunks, from = item % chunks * kChunk, size = a.d - from < kChunk ? a.d - from : kChunk;
    const T* x = static_cast<const T*>(a.x) + n * a.x_stride + from;
    T* out = static_cast<T*>(a.out) + n * a.d + from;
    const T g = static_cast<const T*>(a.grad)[n];
    const T norm = a.squared ? T(1) : static_cast<const T*>(a.norm)[n];
    const double factor = a.squared ? 2 * double(g) : double(g) / double(norm);
    if (norm == T(0)) {  // the gradient there is zero, whatever g
      for (int64_t i = 0; i < size; ++i) out[i] = T(0);
    } else if (a.squared || (fabs(factor) > 1e-30 && fabs(factor) < 1e30)) {
      const T f = T(factor);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = x[i] * f;
    } else {  // the factor alone may leave T's range where the product does not
      for (int64_t i = 0; i < size; ++i) out[i] = x[i] / norm * g;
    }
  }
}

}  // namespace

GENFAST_KERNEL(sample_norm, SampleNormArgs, forward<T>(a))
GENFAST_KERNEL(sample_norm_backward, SampleNormArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
